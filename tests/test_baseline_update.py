"""Baselines change only from fit, complete runs and with a reason; what is refused stays as it was and says why."""

import math

import pytest
from msgspec import structs

from pytest_zimage.baselines import writing
from pytest_zimage.baselines.compare import base_phases, compare, compare_to_control
from pytest_zimage.baselines.recordable import Measured, outlying_runs
from pytest_zimage.baselines.schema import Key, MetricBaseline, Published
from pytest_zimage.baselines.store import BaselineStore, Found, Neighbours
from pytest_zimage.baselines.update import update_baselines
from pytest_zimage.catalog import load_catalog
from pytest_zimage.engines.protocol import Injection, Loaded, Reported, Round
from pytest_zimage.engines.record import ColdLoad, RunRecord
from pytest_zimage.errors import BaselineError, MeasurementError
from pytest_zimage.verdict.metrics import measurable, take

CATALOG = load_catalog()
KEY = Key(device="gb10", engine="diffusers", model_set="official", workload="turbo-1024", variant="nvfp4")
EVERY = tuple(name for name, metric in CATALOG.metrics.items() if metric.kind != "paired")
"""Image scores come from images and not from runs: test_quality_baselines.py."""
MIB = 2**20


def record(index=0, seconds=5.5, *, rounds=3, emptied=True, variant="nvfp4", **changes):
    run = RunRecord(
        variant=variant,
        index=index,
        engine="diffusers",
        model_set="official",
        workload="turbo-1024",
        device="cuda:0",
        rounds=tuple(
            Round(
                seconds=seconds + 0.001 * i,
                phases_s={"text_encode": 0.1, "vae_decode": 0.2 + 0.1 * i},
                forwards=8,
                pixels_sha256="ab",
            )
            for i in range(rounds)
        ),
        cold=ColdLoad(total_s=2 * seconds, phases_s={"read": 4.0}, residency=0.0, emptied=emptied),
        memory=Reported(
            rss_peak_bytes=1000 * MIB,
            rss_peak_source="VmHWM",
            rss_sampled_peak_bytes=1001 * MIB,
            device_peak_bytes=2000 * MIB,
            device_reserved_peak_bytes=None,
            nvml_process_peak_bytes=2500 * MIB,
        ),
        rss_idle_bytes=400 * MIB,
        loaded=Loaded(
            phases_s={},
            load_s=1.0,
            weight_bytes={"bfloat16": 10, "nvfp4": 20},
            tensors={"bfloat16": 3, "nvfp4": 4},
            compute={"plain": 5, "quantised-activations": 6},
        ),
        disk_bytes=12345,
        dispatch={"linear: quantised-activations": 48, "scaled_mm_nvfp4: cuda": 48},
        environment={"torch": "2.11.0", "driver": "580", "machine": "here"},
        started_at=f"2026-02-0{index + 1}T00:00:00+00:00",
    )
    return structs.replace(run, **changes)


def five(**changes):
    return tuple(record(i, 5.5 + 0.002 * i, **changes) for i in range(5))


def measured(runs=None, metrics=EVERY, **changes):
    fields = {"key": KEY, "runs": five() if runs is None else tuple(runs), "metrics": metrics, "rounds_asked": 3}
    return Measured(**{**fields, **changes})


@pytest.fixture
def store(tmp_path):
    return BaselineStore(tmp_path / "baselines", tmp_path / "local", catalog=CATALOG, machine="here")


def update(store, *ones, mode="replace", reason="new kernels"):
    results = update_baselines(
        store, CATALOG, list(ones) or [measured()], mode=mode, reason=reason, recorded_at="2026-02-06T00:00:00+00:00"
    )
    return {(result.variant, result.metric): result for result in results}


def only(results):
    assert len(results) == 1
    return next(iter(results.values()))


def warm(**changes):
    return measured(metrics=("warm_latency",), **changes)


# ---- samples ------------------------------------------------------------


def test_every_metric_of_a_run_can_be_taken():
    assert set(measurable()) == set(EVERY)


def test_samples_of_a_run():
    run = record()
    assert take("warm_latency", run).rounds == (5.5, 5.501, 5.502)
    assert take("warm_latency", run).phases == pytest.approx({"text_encode": 0.1, "vae_decode": 0.3})
    cold = take("cold_load", run)
    assert (cold.rounds, cold.phases, cold.emptied) == ((11.0,), {"read": 4.0}, True)
    assert take("rss_peak", run).rounds == (1001 * MIB,)
    assert take("working_set", run).rounds == (601 * MIB,)
    assert take("device_peak", run).rounds == (2000 * MIB,)
    assert take("gpu_process_peak", run).rounds == (2500 * MIB,)
    exact = {name: take(name, run).exact for name in ("disk_bytes", "weight_bytes", "tensors", "linears", "forwards")}
    assert exact == {
        "disk_bytes": 12345,
        "weight_bytes": {"bfloat16": 10, "nvfp4": 20},
        "tensors": {"bfloat16": 3, "nvfp4": 4},
        "linears": {"plain": 5, "quantised-activations": 6},
        "forwards": 8,
    }


def test_the_kernels_mark_counts_where_the_sampler_saw_less():
    memory = structs.replace(record().memory, rss_sampled_peak_bytes=None)
    assert take("rss_peak", record(memory=memory)).rounds == (1000 * MIB,)


def test_what_a_machine_cannot_say_is_named_and_nothing_is_made_up():
    memory = structs.replace(record().memory, device_peak_bytes=None, notes=("no device",))
    assert take("device_peak", record(memory=memory)).unavailable == "no device"
    loaded = structs.replace(record().loaded, tensors={})
    assert "does not report tensors" in take("tensors", record(loaded=loaded)).unavailable


@pytest.mark.parametrize(
    ("metric", "changes", "message"),
    [
        ("warm_latency", {"rounds": ()}, "no timed rounds"),
        ("forwards", {"rounds": ()}, "no timed rounds"),
        ("disk_bytes", {"disk_bytes": 0}, "disk_bytes is 0"),
        ("working_set", {"rss_idle_bytes": 2000 * MIB}, "working_set is -"),
        ("working_set", {"rss_idle_bytes": 0}, "working_set is 0"),
        ("speed", {}, "no run measures 'speed'"),
    ],
)
def test_records_that_cannot_be(metric, changes, message):
    with pytest.raises(MeasurementError, match=message):
        take(metric, structs.replace(record(), **changes))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_times_that_cannot_be(bad):
    run = record()
    rounds = (run.rounds[0], structs.replace(run.rounds[1], seconds=bad))
    with pytest.raises(MeasurementError, match="run 0 of nvfp4: warm_latency is"):
        take("warm_latency", structs.replace(run, rounds=rounds))


def test_forwards_that_differ_between_rounds():
    run = record()
    rounds = (run.rounds[0], structs.replace(run.rounds[1], forwards=9))
    with pytest.raises(MeasurementError, match="differ between rounds: 8, 9"):
        take("forwards", structs.replace(run, rounds=rounds))


# ---- what is stored ------------------------------------------------------------


def test_five_runs_become_a_baseline_in_their_layers(store):
    results = update(store)
    assert {result.action for result in results.values()} == {"recorded"}
    found = store.find(KEY, "warm_latency")
    assert isinstance(found, Found)
    assert [run.rounds for run in found.metric.runs] == [take("warm_latency", run).rounds for run in five()]
    assert [run.recorded_at for run in found.metric.runs] == [run.started_at for run in five()]
    assert (found.baseline.reason, found.baseline.provenance.kind) == ("new kernels", "measured")
    assert found.baseline.environment["driver"] == "580"
    assert base_phases(found.metric) == pytest.approx({"text_encode": 0.1, "vae_decode": 0.3})
    portable = store.find(KEY, "disk_bytes")
    assert (portable.metric.exact, portable.layer) == (12345, "portable")
    assert portable.baseline.environment == {"torch": "2.11.0"}
    row = results["nvfp4", "warm_latency"]
    assert (row.old, row.runs_old, row.runs_new) == (None, 0, 5)
    assert row.new == pytest.approx(5.505, abs=0.001)


def test_old_to_new_is_reported(store):
    update(store, warm())
    row = only(update(store, warm(runs=(record(i, 6.6) for i in range(5)))))
    assert (row.action, row.unit, row.runs_old, row.runs_new) == ("recorded", "s", 5, 5)
    assert (row.old, row.new) == (pytest.approx(5.505, abs=0.001), pytest.approx(6.601, abs=0.001))


def test_metrics_not_measured_this_time_stay_with_the_environment_they_were_recorded_in(store):
    update(store)
    before = store.find(KEY, "rss_peak").metric
    newer = tuple(structs.replace(run, environment={"torch": "2.12.0", "gpu": "new"}) for run in five())
    assert only(update(store, warm(runs=newer))).action == "recorded"
    after = store.find(KEY, "rss_peak")
    assert after.metric.runs == before.runs
    assert after.baseline.environment_of("rss_peak") == record().environment
    assert after.baseline.environment_of("warm_latency") == {"torch": "2.12.0", "gpu": "new"}


def test_extend_adds_runs(store):
    update(store, warm())
    row = only(update(store, warm(runs=(record(i, 5.6) for i in range(2))), mode="extend"))
    assert (row.action, row.runs_old, row.runs_new) == ("extended", 5, 7)
    assert len(store.find(KEY, "warm_latency").metric.runs) == 7


def test_new_leaves_what_is_there(store):
    update(store, warm())
    results = update(store, measured(runs=(record(i, 9.0) for i in range(5))), mode="new")
    assert results["nvfp4", "warm_latency"].action == "kept"
    assert results["nvfp4", "cold_load"].action == "recorded"
    assert store.find(KEY, "warm_latency").metric.runs[0].rounds[0] == 5.5


def test_equal_exact_numbers_change_no_file(store):
    update(store)
    _, path = store.locate(KEY, "disk_bytes")
    stamp = path.stat().st_mtime_ns
    results = update(store, measured(metrics=("disk_bytes", "tensors")))
    assert {result.action for result in results.values()} == {"unchanged"}
    assert path.stat().st_mtime_ns == stamp


def test_the_band_of_a_file_survives(store):
    update(store, warm())

    def widen(current):
        text = writing.to_bytes(current).replace(b'"warm_latency": {', b'"warm_latency": {"band": {"relative": 0.1},')
        path.write_bytes(text)

    _, path = store.locate(KEY, "warm_latency")
    store.rewrite(KEY, "device", widen)
    update(store, warm())
    assert store.find(KEY, "warm_latency").metric.band.relative == 0.1


def test_exact_metrics_need_one_run_and_sampled_ones_five(store):
    results = update(store, measured(runs=[record()]))
    assert results["nvfp4", "disk_bytes"].action == "recorded"
    refused = results["nvfp4", "warm_latency"]
    assert (refused.action, refused.reason) == ("refused", "incomplete: 1 of at least 5 runs")
    assert "--zimage-runs 5" in refused.mend


def test_another_machines_file_gives_way_in_the_machine_layer(store, tmp_path):
    key = structs.replace(KEY, device="cpu")
    elsewhere = BaselineStore(tmp_path / "baselines", tmp_path / "local", catalog=CATALOG, machine="elsewhere")
    update(elsewhere, warm(key=key))
    update(store, warm(key=key, runs=[record(i, 7.0) for i in range(5)]), mode="extend")
    assert len(store.find(key, "warm_latency").metric.runs) == 5


# ---- what is refused ------------------------------------------------------------


def refused(store, one, mode="replace"):
    """All rows refused, for one reason, and nothing written; returns the reason."""
    before = {path: path.read_bytes() for path in store.root("device").rglob("*.json")}
    results = update(store, one, mode=mode)
    assert {result.action for result in results.values()} == {"refused"}
    assert all(result.mend for result in results.values())
    assert {path: path.read_bytes() for path in store.root("device").rglob("*.json")} == before
    reasons = {result.reason for result in results.values()}
    assert len(reasons) == 1
    return reasons.pop()


@pytest.mark.parametrize(
    "inject", [Injection(warm_latency=0.05), Injection(cold_load=0.4), Injection(memory_bytes=MIB)]
)
def test_injected_runs_never_become_a_baseline(store, inject):
    runs = [*five()[:4], record(4, inject=inject)]
    assert "injected" in refused(store, measured(runs=runs))


def test_variant_level_refusals(store):
    assert "failing: worker died" in refused(store, measured(problems=("worker died",)))
    assert "unfit: clocks are low" in refused(store, measured(unfit=("clocks are low",)))
    assert "no run succeeded" in refused(store, measured(runs=[]))
    assert "run 2 has 2 of 3 rounds" in refused(store, measured(runs=[*five()[:2], record(2, rounds=2), *five()[3:]]))
    assert "not gb10" in refused(store, measured(runs=five(variant="bf16")))


def test_a_run_that_stands_out_is_to_be_measured_once_more(store):
    runs = [*five()[:3], record(3, 9.0), record(4, 5.5)]
    assert outlying_runs([measured(runs=runs)], CATALOG) == {"nvfp4": {3: ("warm_latency", "cold_load")}}
    assert "run 3 lies more than 5 pooled MAD-SDs" in refused(store, warm(runs=runs))
    again = warm(runs=runs, remeasured=frozenset({3}))
    assert outlying_runs([again], CATALOG) == {}
    assert only(update(store, again)).action == "recorded"


def test_noise_of_the_gate_is_pooled_over_variants():
    noisy = [record(i, s, variant="bf16") for i, s in enumerate((5.0, 5.5, 6.0, 5.2, 5.8))]
    runs = [*five()[:4], record(4, 6.0)]
    alone = [warm(runs=runs)]
    together = [*alone, warm(runs=noisy, key=structs.replace(KEY, variant="bf16"))]
    assert outlying_runs(alone, CATALOG) == {"nvfp4": {4: ("warm_latency",)}}
    assert outlying_runs(together, CATALOG) == {}


def test_cold_loads_of_two_kinds_never_mix(store):
    cold = {"metrics": ("cold_load",)}
    mixed = [*five()[:4], record(4, emptied=False)]
    assert "some did not" in refused(store, measured(runs=mixed, **cold))
    assert only(update(store, measured(**cold))).action == "recorded"
    assert "page cache was not emptied" in refused(store, measured(runs=five(emptied=False), **cold))
    assert "page cache was not emptied" in refused(store, measured(runs=five(emptied=False), **cold), "extend")


def test_a_cold_load_with_an_empty_cache_may_replace_one_without_but_not_extend_it(store):
    cold = {"metrics": ("cold_load",)}
    assert only(update(store, measured(runs=five(emptied=False), **cold))).action == "recorded"
    assert "did not empty" in refused(store, measured(**cold), "extend")
    assert only(update(store, measured(**cold))).action == "recorded"


def test_a_changed_exact_number_is_replaced_but_not_extended(store):
    update(store)
    one = measured(runs=[record(disk_bytes=999)], metrics=("disk_bytes",))
    assert "cannot be extended" in refused(store, one, "extend")
    row = only(update(store, one))
    assert (row.old, row.new) == (12345, 999)


def test_exact_numbers_that_differ_between_runs(store):
    runs = [*five()[:4], record(4, disk_bytes=999)]
    assert "differs between the runs" in refused(store, measured(runs=runs, metrics=("disk_bytes",)))


def test_what_could_not_be_measured_is_kept(store):
    silent = structs.replace(record().memory, device_peak_bytes=None)
    row = only(update(store, measured(runs=five(memory=silent), metrics=("device_peak",))))
    assert (row.action, row.new) == ("kept", None)
    assert "not measured" in row.reason
    partly = [*five()[:4], record(4, memory=silent)]
    assert "only some runs" in refused(store, measured(runs=partly, metrics=("device_peak",)))


@pytest.mark.parametrize("reason", ["", "  "])
def test_no_reason_no_change(store, reason):
    with pytest.raises(BaselineError, match="only with a reason"):
        update(store, reason=reason)


def test_published_figures_are_replaced_never_extended(store):
    def publish(baseline):
        printed = MetricBaseline(unit="s", published=Published(n=10, mean=5.5, std=0.07))
        cold = MetricBaseline(unit="s", published=Published(n=1, mean=12.5))
        provenance = structs.replace(baseline.provenance, kind="published", source="a table")
        return structs.replace(baseline, metrics={"warm_latency": printed, "cold_load": cold}, provenance=provenance)

    update(store)
    store.rewrite(KEY, "device", publish)
    assert "no runs to extend" in refused(store, warm(), "extend")
    assert "not emptied" in refused(store, measured(runs=five(emptied=False), metrics=("cold_load",)))
    assert only(update(store, warm())).action == "recorded"
    found = store.find(KEY, "cold_load")
    assert found.metric.published.mean == 12.5
    assert (found.baseline.provenance.kind, found.baseline.provenance.source) == ("measured", "a table")


def test_a_full_disk_refuses_and_the_other_folders_go_on(store, monkeypatch):
    replace = writing.os.replace

    def full_for_gb10(source, target):
        if "gb10" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(writing.os, "replace", full_for_gb10)
    results = update(store, measured(metrics=("warm_latency", "disk_bytes")))
    assert results["nvfp4", "disk_bytes"].action == "recorded"
    failed = results["nvfp4", "warm_latency"]
    assert failed.action == "refused"
    assert "No space left on device" in failed.reason


def test_replace_mends_a_broken_file_and_extend_does_not(store):
    update(store, warm())
    _, path = store.locate(KEY, "warm_latency")
    path.write_text("{")
    assert "not JSON" in only(update(store, warm(), mode="extend")).reason
    assert only(update(store, warm())).action == "recorded"
    assert isinstance(store.find(KEY, "warm_latency"), Found)


# ---- judged against what was stored ------------------------------------------------------------


def judged(store, metric, runs, **more):
    samples = [take(metric, run) for run in runs]
    stored = store.find(KEY, metric).metric
    return compare(CATALOG.metrics[metric], samples, stored, device=CATALOG.device("gb10"), **more)


def test_what_was_recorded_judges_the_next_session(store):
    update(store)
    for metric in EVERY:
        assert judged(store, metric, [record()]).outcome == "pass"
    assert judged(store, "warm_latency", [record(0, 6.0), record(1, 6.0)]).outcome == "regression"
    assert (
        judged(store, "tensors", [record(loaded=structs.replace(record().loaded, tensors={"a": 1}))]).outcome
        == "changed"
    )


def test_a_cold_load_of_the_other_kind_is_unfit(store):
    update(store)
    got = judged(store, "cold_load", [record(emptied=False)])
    assert got.outcome == "unfit"
    assert "was not emptied before the fresh runs" in got.notes[0]


@pytest.mark.parametrize("stored_kind", [True, False])
def test_cold_loads_of_both_kinds_in_one_session_are_unfit(store, stored_kind):
    update(store, measured(runs=five(emptied=stored_kind), metrics=("cold_load",)))
    got = judged(store, "cold_load", [record(), record(1, emptied=False)])
    assert (got.outcome, got.notes) == ("unfit", ("the page cache was emptied before some of the fresh runs only",))


def test_a_figure_that_vanished_is_an_error(store):
    update(store)
    silent = structs.replace(record().memory, device_peak_bytes=None)
    with pytest.raises(MeasurementError, match="device_peak has a baseline, but"):
        judged(store, "device_peak", [record(memory=silent)])
    with pytest.raises(MeasurementError, match="no fresh run"):
        judged(store, "device_peak", [])


def test_noise_comes_from_the_other_variants_once_they_show_enough(store):
    update(store)
    other = store.find(KEY, "warm_latency").metric
    prior = judged(store, "warm_latency", [record()])
    one = judged(store, "warm_latency", [record()], neighbours=Neighbours(metrics=(other,)))
    two = judged(store, "warm_latency", [record()], neighbours=Neighbours(metrics=(other, other), notes=("a note",)))
    assert prior.noise == one.noise > two.noise
    assert two.notes == ("a note",)


def test_control_explains_a_slow_machine(store):
    update(store)
    stored = store.find(KEY, "warm_latency").metric
    metric, device = CATALOG.metrics["warm_latency"], CATALOG.device("gb10")
    slow = [take("warm_latency", record(i, 6.6)) for i in range(2)]
    same = compare_to_control(metric, slow, stored, slow, stored, device=device)
    assert (same.outcome, same.change) == ("pass", pytest.approx(0, abs=1e-9))
    quick = [take("warm_latency", record(i, 5.5)) for i in range(2)]
    assert compare_to_control(metric, slow, stored, quick, stored, device=device).outcome == "regression"
    printed = MetricBaseline(unit="s", published=Published(n=10, mean=5.5, std=0.07))
    assert compare_to_control(metric, slow, stored, quick, printed, device=device) is None
