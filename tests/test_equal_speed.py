"""Between GPUs of one kind a latency is compared at equal speed of a matrix product; on one GPU as it is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec import structs

from pytest_zimage.baselines.compare import compare
from pytest_zimage.baselines.equal_speed import MULTIPLYING, at_equal_speed
from pytest_zimage.baselines.schema import BaseRun, MetricBaseline
from pytest_zimage.baselines.store import Neighbours
from pytest_zimage.catalog import load_catalog
from pytest_zimage.probes.fitness import CanaryFigures
from pytest_zimage.verdict.metrics import Sample

CATALOG = load_catalog()
H200 = CATALOG.device("h200")
WARM = CATALOG.metrics["warm_latency"]
QUIET = (0.999, 1.001, 1.000, 1.002, 0.998)


def runs(speed: float, device: str, slow: float = 1.0) -> list[BaseRun]:
    """Five runs of a GPU that multiplies at `speed` times 800 TFLOP/s; its images take as much longer."""
    canary = CanaryFigures(matmul_tflops=800 * speed)
    return [
        BaseRun(rounds=(seconds * slow / speed,) * 3, recorded_at="2026-01-01", canary=canary, device=device)
        for seconds in QUIET
    ]


def samples(speed: float, device: str, slow: float = 1.0) -> list[Sample]:
    return [Sample(rounds=run.rounds, canary=run.canary, device=run.device) for run in runs(speed, device, slow)[:3]]


def judged(new: list[Sample], base: list[BaseRun]):
    return compare(WARM, new, MetricBaseline(unit="s", runs=tuple(base)), device=H200)


def test_a_slower_gpu_of_the_kind_is_no_regression():
    found = judged(samples(0.96, "b"), runs(1.0, "a"))
    assert (found.outcome, round(found.speed, 3)) == ("pass", 0.96)
    assert abs(found.change) < 0.002


def test_a_regression_on_a_faster_gpu_is_one():
    """As measured it would be 0.2 % faster than recorded."""
    found = judged(samples(1.052, "b", slow=1.05), runs(1.0, "a"))
    assert found.outcome == "regression"
    assert found.change == pytest.approx(0.05, abs=0.002)


def test_on_the_gpu_that_recorded_it_a_loss_of_speed_is_one():
    """Firmware or heat that slows products and images alike is what the owner of one machine wants to hear of."""
    found = judged(samples(0.95, "a"), runs(1.0, "a"))
    assert (found.outcome, found.speed) == ("regression", None)


def test_a_baseline_of_two_gpus_is_brought_to_one_speed():
    base = runs(1.0, "a") + runs(0.96, "b")
    for new in (samples(0.96, "b"), samples(1.0, "a"), samples(0.98, "c")):
        found = judged(new, base)
        assert found.outcome == "pass"
        assert found.noise < 0.006


@pytest.mark.parametrize(
    "change",
    [{"device": ""}, {"canary": None}, {"canary": CanaryFigures(copy_gb_s=4000.0)}],
    ids=["gpu", "canary", "matmul"],
)
def test_without_knowing_both_sides_they_are_compared_as_they_are(change):
    new = [structs.replace(sample, **change) for sample in samples(0.95, "b")]
    found = judged(new, runs(1.0, "a"))
    assert (found.outcome, found.speed) == ("regression", None)
    assert judged(samples(0.95, "b"), [structs.replace(run, **change) for run in runs(1.0, "a")]).speed is None


def test_one_reading_of_the_canary_is_no_difference_between_runs():
    """Two readings on one GPU 2.5 % apart, images equal: corrected one by one they would be 2.5 % apart."""
    read = [CanaryFigures(matmul_tflops=tflops) for tflops in (780.0, 800.0)]
    fresh = [structs.replace(sample, canary=canary) for sample, canary in zip(samples(1.0, "b"), read, strict=False)]
    fresh = [structs.replace(sample, rounds=(1.0,)) for sample in fresh]
    level = at_equal_speed(fresh, MULTIPLYING, runs(1.0, "a"))
    assert level is not None
    assert level[0] == level[1] == (pytest.approx((780 * 800) ** 0.5 / 800),)


def test_rounds_of_one_gpu_are_left_alone():
    assert at_equal_speed(runs(1.0, "a"), MULTIPLYING) is None
    level = at_equal_speed(runs(1.0, "a") + runs(0.5, "b"), MULTIPLYING)
    assert level is not None
    assert level[0] == pytest.approx(level[5])


COLD = CATALOG.metrics["cold_load"]
READ_S, REST_S = 12.0, 3.0


def loads(gb_s: float | None, machine: str, read: float = 1.0) -> list[BaseRun]:
    """Five cold loads from a disk of `gb_s`; reading takes `read` times what that gives at 1.5."""
    found = []
    for noise in QUIET:
        read_s = READ_S * noise * read * 1.5 / (gb_s or 1.5)
        found.append(
            BaseRun(
                rounds=(read_s + REST_S,),
                recorded_at="2026-01-01",
                emptied=True,
                phases={"read": read_s, "build": REST_S},
                device=machine,
                disk_gb_s=gb_s,
            )
        )
    return found


def cold(new: list[BaseRun], base: list[BaseRun], others: Sequence[MetricBaseline] = ()):
    fresh = [
        Sample(rounds=r.rounds, phases=r.phases, emptied=True, device=r.device, disk_gb_s=r.disk_gb_s) for r in new[:3]
    ]
    stored, neighbours = MetricBaseline(unit="s", runs=tuple(base)), Neighbours(metrics=tuple(others))
    return compare(COLD, fresh, stored, device=H200, neighbours=neighbours)


@pytest.mark.parametrize("gb_s", [0.8, 1.2, 3.0])
def test_another_disk_is_no_regression_and_no_improvement(gb_s):
    found = cold(loads(gb_s, "b"), loads(1.5, "a"))
    assert (found.outcome, round(found.speed, 3)) == ("pass", round(gb_s / 1.5, 3))
    assert abs(found.change) < 0.01, "what is not reading is as it was"


@pytest.mark.parametrize("gb_s", [0.8, 1.5, 1.6])
def test_a_load_that_makes_less_of_another_disk_is_a_regression(gb_s):
    found = cold(loads(gb_s, "b", read=1.6), loads(1.5, "a"))
    assert found.outcome == "regression"
    assert found.change == pytest.approx(0.6 * READ_S / (READ_S + REST_S), abs=0.01)


def test_a_load_that_takes_no_longer_on_a_faster_disk_is_nobodys_fault():
    """The software may be slower, or the disk not what limits it: no alarm and no pass."""
    found = cold(loads(3.0, "b", read=2.0)[:1], loads(1.5, "a"))
    assert (found.outcome, found.wants_more) == ("unfit", False)
    assert "makes less of its disk" in found.notes[0]


def test_a_load_that_takes_no_longer_on_a_slower_disk_is_no_improvement():
    found = cold(loads(0.75, "b", read=0.5)[:1], loads(1.5, "a"))
    assert found.outcome == "pass"


def test_on_the_machine_that_recorded_it_a_slower_disk_is_a_slower_load():
    found = cold(loads(0.8, "a"), loads(1.5, "a"))
    assert (found.outcome, found.speed) == ("regression", None)


@pytest.mark.parametrize(
    ("new", "base"),
    [
        (loads(0.8, "b"), [structs.replace(run, disk_gb_s=None) for run in loads(1.5, "a")]),
        ([structs.replace(run, disk_gb_s=None) for run in loads(0.8, "b")], loads(1.5, "a")),
        (loads(0.8, "b"), [structs.replace(run, device="") for run in loads(1.5, "a")]),
        (loads(0.8, "b"), [structs.replace(run, phases={}) for run in loads(1.5, "a")]),
        (loads(3.0, "b"), [structs.replace(run, disk_gb_s=None) for run in loads(1.5, "a")]),
    ],
    ids=["baseline", "fresh", "machine", "phases", "faster"],
)
def test_without_knowing_both_disks_a_change_is_nobodys(new, base):
    """One run says so: another one would tell no more."""
    found = cold(new[:1], base)
    assert (found.outcome, found.wants_more) == ("unfit", False)
    assert "not known how fast its disk reads" in found.notes[0]


def test_runs_that_say_how_fast_their_disk_was_are_enough():
    """A baseline is extended run by run; those of an older release do not say, and were on a disk of any speed."""
    older = [structs.replace(run, disk_gb_s=None, device="") for run in loads(0.9, "z")]
    found = cold(loads(0.8, "b"), older + loads(1.5, "a"))
    assert (found.outcome, found.k_base) == ("pass", 5)
    assert cold(loads(0.8, "b", read=1.6), older + loads(1.5, "a")).outcome == "regression"
    assert cold(loads(0.8, "b"), older + loads(1.5, "a")[:2]).speed is None, "two are too few"


def test_without_knowing_the_disks_a_load_within_the_band_passes():
    found = cold(loads(1.5, "b"), [structs.replace(run, disk_gb_s=None) for run in loads(1.5, "a")])
    assert found.outcome == "pass"


def test_a_disk_is_as_fast_as_the_loads_of_all_variants_on_it_say():
    """Three readings of one variant at two thirds of what fifteen of others say: its own alone would make +40 %."""
    base = [structs.replace(run, disk_gb_s=1.0) for run in loads(1.5, "a")[:3]]
    others = [MetricBaseline(unit="s", runs=tuple(loads(1.5, machine))) for machine in ("a", "a", "a", "c")]
    fresh = loads(1.5, "b")[:1]
    alone, beside = cold(fresh, base), cold(fresh, base, others)
    assert alone.speed == pytest.approx(1.5)
    assert beside.speed == pytest.approx(1.5 ** (3 / 18)), "and the disk of another machine says nothing of this one"
    assert 0 < beside.change < 0.06 < 0.3 < alone.change


def test_what_other_variants_made_of_a_gpu_is_not_its_speed():
    """A matrix product is as fast as the heat leaves it, and each variant's is another."""
    hot = [MetricBaseline(unit="s", runs=tuple(runs(0.9, "a")))]
    found = compare(
        WARM,
        samples(0.96, "b"),
        MetricBaseline(unit="s", runs=tuple(runs(1.0, "a"))),
        device=H200,
        neighbours=Neighbours(metrics=tuple(hot)),
    )
    assert found.speed == pytest.approx(0.96)


def test_the_noise_of_other_variants_is_that_at_equal_speed():
    quiet = MetricBaseline(unit="s", runs=tuple(loads(1.5, "a") + loads(0.75, "c")))
    found = cold(loads(1.5, "b"), loads(1.5, "a"), [quiet, quiet])
    assert found.noise < 0.03, "two machines, one disk half as fast: the loads are 80 % apart as timed"
