"""Whether a machine was fit to be timed: what counts against it, and that the unknown does not."""

from __future__ import annotations

import pytest
from msgspec import convert, structs, to_builtins

from pytest_zimage.catalog import FitnessLimits, load_catalog
from pytest_zimage.errors import CatalogError
from pytest_zimage.probes.fitness import CanaryFigures, Fitness, GpuProcess, Reading, Recorded, figure, reasons
from pytest_zimage.probes.fitness_fault import limits_for, simulated

GB = 10**9
LIMITS = FitnessLimits()
RECORDED = Recorded(canary=CanaryFigures(matmul_tflops=790.0, copy_gb_s=4000.0))


def canary(matmul=790.0, copy=4000.0) -> CanaryFigures:
    return CanaryFigures(matmul_tflops=matmul, copy_gb_s=copy)


QUIET = Reading(
    sm_clock_mhz=1980,
    sm_clock_max_mhz=1980,
    throttle=(),
    temperature_c=40,
    power_w=120.0,
    power_limit_w=700.0,
    processes=(),
    host_load=0.02,
    swap_bytes=0,
    canary=canary(),
)
BUSY = structs.replace(QUIET, sm_clock_mhz=1755, throttle=("power cap",), temperature_c=66, power_w=690.0)


def but(reading: Reading = QUIET, /, **changes) -> Reading:
    return structs.replace(reading, **changes)


def around(before=QUIET, during=BUSY, after=QUIET) -> Fitness:
    return Fitness(before=before, during=during, after=after)


def test_a_large_gpu_at_its_power_cap_is_fit():
    assert reasons(around(), LIMITS, RECORDED) == ()


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("word", ["thermal throttle", "hardware thermal throttle", "hardware slowdown", "power brake"])
def test_throttling_at_any_moment_is_named(moment, word):
    assert reasons(around(**{moment: but(throttle=("power cap", word))}), LIMITS) == (word,)


@pytest.mark.parametrize("word", ["power cap", "sync boost", "display clock", "reason 0x400"])
def test_what_only_the_canary_can_judge_is_no_reason(word):
    assert reasons(around(during=but(throttle=(word,))), LIMITS) == ()


def test_which_throttling_counts_is_data():
    strict = structs.replace(LIMITS, throttle=("power cap",))
    assert reasons(around(), strict) == ("power cap",)
    assert reasons(around(during=but(throttle=("thermal throttle",))), strict) == ()


def test_another_process_is_named_with_what_it_holds():
    two = (GpuProcess(4711, "python", int(3.1 * GB)), GpuProcess(12, "Xorg", 200 << 20))
    assert reasons(around(before=but(processes=two)), LIMITS) == ("another process holds 3.1 GB: pid 4711 python",)


def test_a_process_counts_by_the_most_it_was_seen_to_hold():
    small, large = GpuProcess(7, "", 300 << 20), GpuProcess(7, "", 2 * GB)
    seen = around(but(processes=(small,)), but(processes=(large,)), but(processes=(small,)))
    assert reasons(seen, LIMITS) == ("another process holds 2.0 GB: pid 7",)


@pytest.mark.parametrize(("size", "unfit"), [(256 << 20, False), ((256 << 20) + 1, True), (None, False)])
def test_only_more_than_the_limit_counts(size, unfit):
    assert bool(reasons(around(after=but(processes=(GpuProcess(7, "", size),))), LIMITS)) is unfit


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (canary(matmul=612.0), "matmul canary 612 TFLOP/s, 790 recorded (-23 %)"),
        (canary(copy=3100.0), "copy canary 3,100 GB/s, 4,000 recorded (-22 %)"),
    ],
)
def test_a_canary_below_its_recorded_value_is_named(figures, said):
    slow = but(canary=figures)
    assert reasons(around(slow, BUSY, slow), LIMITS, RECORDED) == (said,)


@pytest.mark.parametrize(("share", "unfit"), [(0.951, False), (0.949, True), (1.2, False)])
def test_the_limit_of_the_canary_is_five_per_cent_below(share, unfit):
    slow = but(canary=canary(790 * share, 4000))
    assert bool(reasons(around(slow, BUSY, slow), LIMITS, RECORDED)) is unfit


def test_a_device_that_changed_during_the_rounds_is_named_without_any_record():
    assert reasons(around(after=but(canary=canary(612.0, 4000))), LIMITS) == (
        "matmul canary 790 TFLOP/s before and 612 after the rounds (-23 %)",
    )
    assert reasons(around(before=but(canary=canary(612.0, 4000))), LIMITS) == (
        "matmul canary 612 TFLOP/s before and 790 after the rounds (+29 %)",
    )


def test_what_else_may_explain_a_canary_is_said():
    told = Recorded(canary=canary(), differs="torch 2.10.0 when recorded, 2.11.0 now")
    slow = but(canary=canary(700.0, 4000.0))
    (reason,) = reasons(around(slow, BUSY, slow), LIMITS, told)
    assert reason.endswith("(-11 %); torch 2.10.0 when recorded, 2.11.0 now")


def test_an_sm_clock_far_below_its_maximum_counts_under_load_only():
    assert reasons(around(before=but(sm_clock_mhz=345)), LIMITS) == ()
    assert reasons(around(during=but(BUSY, sm_clock_mhz=345, sm_clock_max_mhz=None)), LIMITS) == (
        "SM clock down to 345 of 1,980 MHz",
    )


def test_a_busy_host_and_growing_swap_are_named():
    assert reasons(around(after=but(host_load=0.97)), LIMITS) == ("others keep 97 % of the host's cores busy",)
    assert reasons(around(after=but(swap_bytes=2 * GB)), LIMITS) == ("swap in use grew by 2.0 GB",)
    assert reasons(around(before=but(swap_bytes=2 * GB), after=but(swap_bytes=2 * GB)), LIMITS) == ()


def test_all_reasons_are_told():
    bad = but(throttle=("thermal throttle",), processes=(GpuProcess(7, "x", GB),), host_load=1.0)
    assert len(reasons(around(bad), LIMITS, RECORDED)) == 3


FIELDS = [name for name in Reading.__struct_fields__ if name not in ("looks", "unknown", "canary")]


@pytest.mark.parametrize("field", FIELDS)
def test_what_is_unknown_is_never_held_against_a_machine(field):
    silent = [but(reading, **{field: None}) for reading in (QUIET, BUSY, QUIET)]
    assert reasons(around(*silent), LIMITS, RECORDED) == ()


def test_a_machine_that_says_nothing_is_fit():
    assert reasons(Fitness(before=Reading()), LIMITS, RECORDED) == ()
    assert reasons(Fitness(before=Reading(), during=Reading(), after=Reading()), LIMITS, RECORDED) == ()


def test_a_record_without_a_canary_leaves_the_present_one_unjudged():
    slow = but(canary=canary(1.0, 1.0))
    assert reasons(around(slow, BUSY, slow), LIMITS, Recorded(canary=CanaryFigures())) == ()


def test_the_cpu_is_looked_at_and_never_unfit():
    limits = load_catalog().device("cpu").fitness
    bad = but(throttle=("thermal throttle",), host_load=1.0, processes=(GpuProcess(7, "x", GB),))
    assert reasons(around(bad, bad, bad), limits, RECORDED) == ()
    assert load_catalog().device("h200").fitness == LIMITS


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("throttle", "thermal throttle"),
        ("process", "another process holds 3.1 GB: pid 4711 (injected)"),
        ("canary:0.8", "matmul canary 100 TFLOP/s before and 80.0 after the rounds (-20 %)"),
    ],
)
def test_an_injected_fault_counts_on_the_cpu_too_and_nothing_else_does(fault, reason):
    limits = limits_for(load_catalog().device("cpu").fitness, fault)
    plain = Reading(host_load=1.0, swap_bytes=0)
    busier = structs.replace(plain, swap_bytes=10 * GB)
    seen = Fitness(before=simulated(plain, fault, "before"), after=simulated(busier, fault, "after"))
    assert reasons(seen, limits) == (reason,)


def test_an_injected_canary_scales_the_true_one():
    assert simulated(QUIET, "canary:0.8", "after").canary == canary(632.0, 4000.0)
    assert simulated(QUIET, "canary:0.8", "before") == QUIET
    assert simulated(QUIET, "", "after") == QUIET


def test_a_baseline_stores_the_better_of_before_and_after():
    assert around(after=but(canary=canary(770.0, None))).canary() == canary(790.0, 4000.0)
    assert Fitness(before=Reading()).canary() == CanaryFigures()


@pytest.mark.parametrize(
    ("key", "value"), [("canary_below", 5), ("host_load", -0.1), ("process_bytes", -1), ("throttle", ["hot"])]
)
def test_limits_that_make_no_sense_are_refused_by_name(tmp_path, key, value):
    file = tmp_path / "own.toml"
    file.write_text(f'[devices.box]\ntitle = "box"\n[devices.box.fitness]\n{key} = {value!r}\n')
    with pytest.raises(CatalogError, match=rf"own\.toml: \[devices\.box\]: .*{key if key != 'throttle' else 'hot'}"):
        load_catalog([file])


def test_limits_are_read_from_the_device_table(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('[devices.box]\ntitle = "box"\nfitness = { process_bytes = 0, throttle = ["power cap"] }\n')
    found = load_catalog([file]).device("box").fitness
    assert (found.process_bytes, found.throttle, found.judged) == (0, ("power cap",), True)


def test_it_survives_the_results_file():
    whole = around(before=but(processes=(GpuProcess(1, "x", 2),), unknown=("power limit: NVML says Not Supported",)))
    assert convert(to_builtins(whole), Fitness) == whole


@pytest.mark.parametrize(("value", "text"), [(3100.0, "3,100"), (612.4, "612"), (45.12, "45.1"), (0.5, "0.500")])
def test_figures_have_three_digits(value, text):
    assert figure(value) == text
