"""What a report says of the machine, and how much of the device a latency makes use of."""

from __future__ import annotations

import pytest

from pytest_zimage.probes.fitness import CanaryFigures, Fitness, GpuProcess, Reading
from pytest_zimage.reports.delta import delta_text
from pytest_zimage.reports.machine import fitness_lines, throughput, throughput_lines, unfit_lines
from pytest_zimage.reports.table import verdict_table
from pytest_zimage.verdict.model import Verdict

PFLOP = 10**15


def latency(**changes) -> Verdict:
    known = {
        "test": "suites/test_warm_latency.py::test_warm_latency[bf16]",
        "variant": "bf16",
        "metric": "warm_latency",
        "unit": "s",
        "verdict": "PASS",
        "outcome": "pass",
        "value": 1.02,
        "flops_per_image": int(0.47 * PFLOP),
        "ceiling_tflops": 790.4,
    }
    return Verdict(**{**known, **changes})


def test_throughput_and_share_of_the_ceiling():
    assert throughput(latency()) == "0.47 PFLOP an image, 461 TFLOP/s, 58 % of this GPU's bf16 matmul (790)"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ceiling_tflops": None}, "0.47 PFLOP an image, 461 TFLOP/s"),
        ({"flops_per_image": None}, ""),
        ({"flops_per_image": 0}, ""),
        ({"value": None}, ""),
        ({"value": 0.0}, ""),
        ({"flops_per_image": 11_519_655_936, "value": 0.3}, "11.5 GFLOP an image, 38.4 GFLOP/s, under 1 % of *"),
        ({"value": 0.5}, "0.47 PFLOP an image, 940 TFLOP/s, 119 % of this GPU's bf16 matmul (790)"),
    ],
)
def test_no_more_is_said_than_is_known(changes, text):
    said = throughput(latency(**changes))
    assert said.startswith(text.removesuffix("*")) if text.endswith("*") else said == text


@pytest.mark.parametrize("outcome", ["pass", "regression", "improvement", "inconclusive", "no-baseline", "unfit"])
def test_every_report_of_a_latency_has_it(outcome):
    (line,) = [line for line in delta_text(latency(outcome=outcome)).splitlines() if "PFLOP" in line]
    assert line == "  speed       0.47 PFLOP an image, 461 TFLOP/s, 58 % of this GPU's bf16 matmul (790)"


def test_a_load_from_another_disk_says_what_it_was_compared_as():
    slower = latency(
        metric="cold_load", flops_per_image=None, value=22.0, baseline=15.0, change=0.02, speed=0.6, ceiling_tflops=None
    )
    (line,) = throughput_lines([slower])
    assert line == "  bf16  another disk than recorded, reading 40.0 % slower: compared at equal speed, as 15.3 s"
    assert "another disk" in delta_text(slower)
    assert list(throughput_lines([latency(), slower])) == [*throughput_lines([latency()]), line], "each has its own"


def test_the_summary_has_one_line_a_variant():
    rows = [latency(), latency(metric="cold_load", flops_per_image=None), latency(variant="nvfp4-fp8e", value=1.2)]
    assert [line.split("  ")[1] for line in throughput_lines(rows)] == ["bf16", "nvfp4-fp8e"]
    assert "\n  nvfp4-fp8e  0.47 PFLOP an image, 392 TFLOP/s" in verdict_table(rows)
    assert "FLOP" not in verdict_table([latency(flops_per_image=None)])


def test_the_summary_names_each_reason_once():
    rows = [latency(variant=name, verdict="UNFIT", outcome="unfit", unfit=("thermal throttle",)) for name in ("a", "b")]
    assert unfit_lines(rows) == ["  unfit: thermal throttle (a warm_latency, b warm_latency)"]
    assert unfit_lines([latency()]) == []


def test_the_command_after_an_unfit_machine_measures_again_before_anything_is_recorded():
    unfit = latency(verdict="UNFIT", outcome="unfit", unfit=("thermal throttle",))
    missing = latency(metric="rss_peak", verdict="NO BASELINE", outcome="no-baseline")
    assert verdict_table([missing, unfit]).splitlines()[-1].startswith("next: pytest suites -k test_warm_latency ")


def test_what_was_read_is_told_run_by_run():
    before = Reading(
        sm_clock_mhz=345,
        sm_clock_max_mhz=1980,
        throttle=(),
        power_limit_w=700.0,
        host_load=0.12,
        swap_bytes=3 << 30,
        canary=CanaryFigures(matmul_tflops=790.0, copy_gb_s=4000.0),
        unknown=("temperature: NVML says Not Supported",),
    )
    during = Reading(sm_clock_mhz=1755, throttle=("power cap",), power_w=655.4)
    after = Reading(
        processes=(GpuProcess(4711, "python", 3_100_000_000), GpuProcess(12)),
        canary=CanaryFigures(matmul_tflops=612.0, copy_gb_s=3990.0),
    )
    told = Fitness(before=before, during=during, after=after, waited_s=60.0, retried=True)
    assert fitness_lines([told, Fitness(before=Reading())]) == (
        "new run 1: SM clock 1,755 of 1,980 MHz, 655 of 700 W, power cap; canary matmul 790 -> 612 TFLOP/s, "
        "copy 4,000 -> 3,990 GB/s; pid 4711 python holds 3.1 GB, pid 12, others keep 12 % of the host's cores busy, "
        "3.00 GiB of swap in use; waited 60 s, timed a second time",
        "new run 2: nothing could be read",
        "unknown: temperature: NVML says Not Supported",
    )
