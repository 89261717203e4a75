"""`python -m pytest_zimage.baselines.seen`: where variants were seen to draw, from results files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from msgspec import structs

from pytest_zimage.baselines.seen import main
from pytest_zimage.baselines.sightings import FILE, read_sightings
from pytest_zimage.catalog import load_catalog
from pytest_zimage.engines.protocol import Injection, Loaded, Reported, Round
from pytest_zimage.engines.record import ColdLoad, RunRecord
from pytest_zimage.probes.fitness import Fitness, Reading
from pytest_zimage.reports.results import Results, read, write
from pytest_zimage.verdict.model import Verdict

SHIPPED = Path(__file__).parents[1] / "baselines" / FILE
H200 = {"device_class": "h200", "device": "NVIDIA H200", "cpu": "Xeon", "torch": "2.11.0", "comfy-kitchen": "0.2.40"}
UNFIT = {"fitness": Fitness(before=Reading(), reasons=("thermal throttle",))}
NO_MEMORY = Reported(1, "VmHWM", 1, None, None, None)
DAYS = {day: f"2026-02-0{day}T04:05:06+00:00" for day in range(1, 5)}


RUN = RunRecord(
    variant="bf16",
    index=0,
    engine="diffusers",
    model_set="synthetic-full",
    workload="turbo-1024",
    device="cuda:0",
    rounds=tuple(Round(seconds, {}, 8, "ab") for seconds in (0.5, 1.5)),
    cold=ColdLoad(total_s=1.0, phases_s={}, residency=None, emptied=False),
    memory=Reported(1, "VmHWM", 1, 1 << 30, None, None),
    rss_idle_bytes=1,
    loaded=Loaded({}, 0.5, {}, {}, {}),
    disk_bytes=1,
    dispatch={"scaled_mm_nvfp4: cuda": 8},
    environment=H200,
    started_at=DAYS[1],
)


@pytest.fixture
def session(tmp_path):
    """Writes the results file of a session in which bf16 and nvfp4 drew; `change` is what nvfp4's run had otherwise."""

    def make(name="results.json", *, day=1, machine=H200, verdicts=(), **change):
        bf16 = structs.replace(RUN, environment=machine, started_at=DAYS[day])
        nvfp4 = structs.replace(bf16, **{"variant": "nvfp4", "memory": NO_MEMORY, **change})
        results = Results(started_at="", finished_at="", environment={}, verdicts=verdicts, runs=(bf16, nvfp4))
        write(tmp_path / name, results)
        return tmp_path / name

    return make


@pytest.fixture
def baselines(tmp_path):
    return tmp_path / "baselines"


@pytest.fixture
def see(baselines):
    """Records what results files show; returns the exit status."""
    return lambda *paths: main([*map(str, paths), "--baselines", str(baselines)])


@pytest.fixture
def rows(baselines):
    """What `seen.json` holds, by variant."""
    return lambda: {one["key"]["variant"]: one for one in json.loads((baselines / FILE).read_text())["sightings"]}


def test_a_run_is_a_sighting(session, see, rows, baselines, capsys):
    assert see(session()) == 0
    key = {"device": "h200", "engine": "diffusers", "model_set": "synthetic-full", "workload": "turbo-1024"}
    same = {"seen_at": DAYS[1], "device_name": "NVIDIA H200", "torch": "2.11.0", "comfy_kitchen": "0.2.40"}
    assert rows() == {
        "bf16": {"key": {**key, "variant": "bf16"}, "warm_latency_s": 1.0, "device_peak_bytes": 1 << 30, **same},
        "nvfp4": {"key": {**key, "variant": "nvfp4"}, "warm_latency_s": 1.0, **same},
    }
    assert f"2 sightings recorded in {baselines / FILE}" in capsys.readouterr().out


def test_a_cpu_is_named_by_its_processor(session, see, rows):
    see(session(machine={"device_class": "cpu", "device": "CPU", "cpu": "Neoverse V2"}))
    assert {row["device_name"] for row in rows().values()} == {"Neoverse V2"}


@pytest.mark.parametrize("days", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_the_newest_stays_whatever_came_first(session, see, rows, days):
    for day in days:
        assert see(session(day=day)) == 0
    assert {row["seen_at"] for row in rows().values()} == {DAYS[3]}


def test_the_newest_of_several_files_stays(session, see, rows):
    assert see(session("new.json", day=3), session("old.json", day=2)) == 0
    assert {row["seen_at"] for row in rows().values()} == {DAYS[3]}


def test_each_device_class_has_its_own(session, see, baselines):
    see(session())
    see(session(machine=H200 | {"device_class": "b200"}))
    found = read_sightings(baselines / FILE)
    assert [(one.key.device, one.key.variant) for one in found] == [
        ("b200", "bf16"),
        ("b200", "nvfp4"),
        ("h200", "bf16"),
        ("h200", "nvfp4"),
    ]


def test_what_is_known_already_changes_nothing(session, see, baselines, capsys):
    see(session())
    before = (baselines / FILE).stat().st_ino, (baselines / FILE).read_bytes()
    capsys.readouterr()
    assert see(session()) == 0
    assert "0 sightings recorded" in capsys.readouterr().out
    assert ((baselines / FILE).stat().st_ino, (baselines / FILE).read_bytes()) == before


def test_an_unfit_machine_drew_too_but_was_not_timed(session, see, rows):
    assert see(session(**UNFIT)) == 0
    assert "warm_latency_s" not in rows()["nvfp4"]
    see(session(day=2))
    assert rows()["nvfp4"]["warm_latency_s"] == 1.0
    see(session(day=3, **UNFIT))
    assert (rows()["nvfp4"]["seen_at"], rows()["bf16"]["seen_at"]) == (DAYS[2], DAYS[3])


def broken(metric: str, word: str, outcome: str = "error") -> dict:
    row = Verdict(test="t", variant="nvfp4", metric=metric, unit="count", verdict=word, outcome=outcome)
    return {"verdicts": (row,)}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"inject": Injection(quality="black")}, "a fault was injected"),
        ({"dequantised": {"layers.0": 8}}, "dequantised instead of computing quantised: layers.0"),
        (
            {"dispatch": {"scaled_mm_nvfp4: dequantised": 8}},
            "dequantised instead of computing quantised: scaled_mm_nvfp4: dequantised",
        ),
        (broken("quantised_layers", "NOT QUANTISED"), "quantised_layers: NOT QUANTISED"),
        (broken("images", "BROKEN"), "images: BROKEN"),
        ({"rounds": ()}, "run 0 of nvfp4 has no timed rounds"),
        ({"environment": {}}, "run 1 of nvfp4 does not say its device class"),
        ({"rounds": (Round(0.0, {}, 8, "ab"),)}, "run 0 of nvfp4: warm_latency is 0.0"),
        ({"environment": {"device_class": "h200\nb200"}}, "its device is 'h200\\nb200'"),
        ({"started_at": ""}, "its seen_at is ''"),
        ({"started_at": "2026-02-01T04:05:06"}, "its seen_at is '2026-02-01T04:05:06'; it must be a time of ISO 8601"),
        ({"started_at": "yesterday"}, "its seen_at is 'yesterday'"),
    ],
)
def test_what_shows_no_variant_as_it_is_is_left_out_and_told(session, see, rows, capsys, change, why):
    assert see(session(**change)) == 0
    assert list(rows()) == ["bf16"]
    told = capsys.readouterr().out
    assert "left out: nvfp4 of " in told
    assert why in told


@pytest.mark.parametrize(
    "change", [broken("quantised_layers", "PASS", "pass"), broken("warm_latency", "SLOWER", "regression"), {}]
)
def test_other_verdicts_do_not_matter(session, see, rows, change):
    see(session(**change))
    assert list(rows()) == ["bf16", "nvfp4"]


def test_nothing_but_faults_is_no_sighting(session, see, baselines, capsys):
    fault = {"inject": Injection(cold_load=0.5)}
    path = session(**fault)
    write(path, structs.replace(read(path), runs=read(path).runs[1:]))
    assert see(path) == 1
    told = capsys.readouterr().err
    assert "left out: nvfp4 of 2026-02-01T04:05:06+00:00: a fault was injected" in told
    assert f"{path}: no run that shows a variant as it is" in told
    assert not baselines.exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: "not json", "not a results file: JSON is malformed"),
        (lambda data: "", "not a results file: Input data was truncated"),
        (lambda data: b'{"schema": 1, "x": "\xff"}', "not a results file: "),
        (lambda data: '{"x": ' + "[" * 100_000, "not a results file: "),
        (lambda data: "{}", "not a results file: Object missing required field `started_at`"),
        (lambda data: json.dumps({"schema": 2, "all": "else"}), "results of schema 2, this is 1"),
        (lambda data: json.dumps(data | {"runs": []}), "no run\n  mend: name the results of a session that drew"),
    ],
)
def test_what_is_no_results_file_is_told_and_nothing_written(session, see, baselines, capsys, damage, says):
    good, path = session("good.json"), session()
    damaged = damage(json.loads(path.read_text()))
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    assert see(path) == 1
    told = capsys.readouterr().err
    assert f"{path}: " in told
    assert says in told
    if "no run" not in says:
        assert see(good, path) == 1, "a good file beside it"
    assert not baselines.exists()


def test_a_file_that_is_not_there_is_told(see, tmp_path, capsys):
    assert see(tmp_path / "none.json") == 1
    assert "none.json: cannot be read: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["x.json"], ["--baselines", "baselines"]])
def test_what_is_not_named_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "required" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told(session, see, baselines, capsys):
    baselines.write_text("a file")
    assert see(session()) == 1
    assert f"{baselines}: baselines cannot be written: " in capsys.readouterr().err
    assert baselines.read_text() == "a file"


def test_a_full_disk_leaves_the_old_file_whole(session, see, baselines, monkeypatch, capsys):
    see(session())
    before, newer = (baselines / FILE).read_bytes(), session(day=2)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert see(newer) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in baselines.iterdir()] == [FILE]
    assert (baselines / FILE).read_bytes() == before


def changed(**fields):
    def change(document: dict) -> str:
        document["sightings"][1] |= fields
        return json.dumps(document)

    return change


BROKEN = [
    (lambda document: "{", "is no list of sightings: Input data was truncated"),
    (lambda document: json.dumps(document).encode().replace(b"NVIDIA", b"\xff"), "is no list of sightings: "),
    (lambda document: '{"x": ' + "[" * 100_000, "is no list of sightings: maximum recursion depth exceeded"),
    (lambda document: "[]", "is no list of sightings: Expected `object`, got `array`"),
    (lambda document: json.dumps({"schema": 1}), "is no list of sightings: Object missing required field `sightings`"),
    (lambda document: json.dumps(document | {"schema": 2}), "is of schema 2, newer than 1"),
    (lambda document: json.dumps({"schema": 2, "all": "else"}), "is of schema 2, newer than 1"),
    (changed(more=1), "is no list of sightings: Object contains unknown field `more`"),
    (changed(warm_latency_s=-1), "sightings[1].warm_latency_s is -1"),
    (changed(device_peak_bytes=0), "sightings[1].device_peak_bytes is 0"),
    (changed(seen_at="2026"), "sightings[1].seen_at is '2026'"),
    (changed(seen_at="2026-02-01T04:05:06+02:00"), "sightings[1].seen_at is '2026-02-01T04:05:06+02:00'"),
    (changed(device_name=" "), "sightings[1].device_name is ' '"),
]


@pytest.mark.parametrize(("damage", "says"), BROKEN)
def test_a_broken_list_is_refused_and_left_as_it_is(session, see, baselines, capsys, damage, says):
    see(session())
    path = baselines / FILE
    damaged = damage(json.loads(path.read_text()))
    data = damaged if isinstance(damaged, bytes) else damaged.encode()
    path.write_bytes(data)
    assert see(session(day=2)) == 1
    told = capsys.readouterr().err
    assert f"{path}: {says}" in told
    assert "mend: " in told
    assert path.read_bytes() == data
    assert [other.name for other in baselines.iterdir()] == [FILE]


def test_what_is_shipped_is_sound_and_of_known_names():
    catalog = load_catalog()
    found = read_sightings(SHIPPED)
    assert len({sighting.key for sighting in found}) == len(found)
    for sighting in found:
        assert sighting.key.variant in catalog.variants
        assert sighting.key.workload in catalog.workloads
        assert sighting.key.device in catalog.devices


def test_every_variant_that_a_cpu_can_draw_was_seen_there():
    """A new variant is drawn before it is shipped; those on SageAttention need a GPU."""
    drawable = {
        name
        for name, variant in load_catalog().variants.items()
        if variant.attention != "sage" and "cpu" in (variant.lanes or ("cpu",))
    }
    seen = {s.key.variant for s in read_sightings(SHIPPED) if s.key.device == "cpu" and s.key.engine == "diffusers"}
    assert drawable - seen == set(), "draw them and record it: python -m pytest_zimage.baselines.seen"
