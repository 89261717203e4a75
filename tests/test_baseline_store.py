"""Where baselines lie, what is absent and what is missing, and files that stay whole whatever happens."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from pytest_zimage.baselines import writing
from pytest_zimage.baselines.layers import layer_of
from pytest_zimage.baselines.reading import NewerSchemaError
from pytest_zimage.baselines.schema import SCHEMA, Baseline, BaseRun, Key, MetricBaseline, Provenance, Published
from pytest_zimage.baselines.store import Absent, BaselineStore, Found
from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import BaselineError

CATALOG = load_catalog()
GPU = Key(device="h200", engine="diffusers", model_set="official", workload="turbo-1024", variant="nvfp4")
CPU = Key(device="cpu", engine="diffusers", model_set="synthetic-tiny", workload="turbo-tiny", variant="bf16")
RUN = BaseRun(rounds=(1.0, 1.01), recorded_at="2026-01-31")
WARM = MetricBaseline(unit="s", runs=(RUN,) * 5)
FORWARDS = MetricBaseline(unit="count", direction="equal", exact=8)


def baseline(key, **metrics):
    return Baseline(
        schema=SCHEMA,
        key=key,
        provenance=Provenance(kind="measured"),
        reason="test",
        recorded_at="2026-01-31",
        environment={"torch": "2.11.0"},
        metrics=metrics,
    )


@pytest.fixture
def store(tmp_path):
    return BaselineStore(tmp_path / "baselines", tmp_path / "local", catalog=CATALOG, machine="here")


def put(store, key, metric="warm_latency", stored=WARM):
    layer, path = store.locate(key, metric)

    def merge(current):
        metrics = dict(current.metrics) if current else {}
        file_key = structs.replace(key, device="portable") if layer == "portable" else key
        return baseline(file_key, **{**metrics, metric: stored})

    assert store.rewrite(key, layer, merge) == path
    return path


# ---- layers ------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "device", "layer"),
    [
        ("warm_latency", "cpu", "machine"),
        ("rss_peak", "cpu", "machine"),
        ("warm_latency", "gb10", "device"),
        ("device_peak", "h200", "device"),
        ("disk_bytes", "cpu", "portable"),
        ("disk_bytes", "gb10", "portable"),
        ("forwards", "h200", "portable"),
        ("tensors", "h200", "portable"),
        ("weight_bytes", "h200", "portable"),
        ("linears", "cpu", "portable"),
        ("linears", "gb10", "device"),
        ("clip_score", "cpu", "portable"),
        ("clip_score", "gb10", "device"),
        ("lpips", "cpu", "portable"),
        ("ssim", "h200", "device"),
    ],
)
def test_layer_of_each_kind_of_metric(metric, device, layer):
    assert layer_of(CATALOG.metrics[metric], CATALOG.device(device)) == layer


def test_paths_of_the_three_layers(store, tmp_path):
    assert put(store, GPU) == tmp_path / "baselines/h200/diffusers-official-turbo-1024/nvfp4.json"
    assert put(store, CPU) == tmp_path / "local/cpu/diffusers-synthetic-tiny-turbo-tiny/bf16.json"
    portable = tmp_path / "baselines/portable/diffusers-synthetic-tiny-turbo-tiny/bf16.json"
    assert put(store, CPU, "forwards", FORWARDS) == portable
    assert json.loads(portable.read_bytes())["key"]["device"] == "portable"


def test_a_portable_baseline_recorded_on_one_device_is_found_on_another(store):
    put(store, CPU, "forwards", FORWARDS)
    found = store.find(structs.replace(CPU, device="gb10"), "forwards")
    assert isinstance(found, Found)
    assert (found.metric, found.layer) == (FORWARDS, "portable")


# ---- absent, missing, other machine ------------------------------------------------------------


def test_no_folder_is_absent(store):
    found = store.find(GPU, "warm_latency")
    assert isinstance(found, Absent)
    assert "h200/diffusers-official-turbo-1024" in found.reason


def test_an_empty_folder_is_absent_too(store, tmp_path):
    (tmp_path / "baselines" / GPU.folder()).mkdir(parents=True)
    assert isinstance(store.find(GPU, "warm_latency"), Absent)


def test_a_folder_without_the_variant_is_an_error(store):
    put(store, GPU)
    with pytest.raises(BaselineError, match=r"bf16\.json: is missing") as caught:
        store.find(structs.replace(GPU, variant="bf16"), "warm_latency")
    assert "--zimage-config bf16 --update-baselines" in caught.value.mend


def test_a_file_without_the_metric_is_an_error(store):
    put(store, GPU)
    with pytest.raises(BaselineError, match="has no metric 'cold_load'; it has warm_latency"):
        store.find(GPU, "cold_load")


def test_an_unknown_metric_is_an_error(store):
    with pytest.raises(BaselineError, match="unknown metric 'speed'"):
        store.find(GPU, "speed")


def test_another_machines_timings_are_absent_and_say_so(store, tmp_path):
    put(store, CPU)
    elsewhere = BaselineStore(tmp_path / "baselines", tmp_path / "local", catalog=CATALOG, machine="elsewhere")
    found = elsewhere.find(CPU, "warm_latency")
    assert isinstance(found, Absent)
    assert "recorded on another machine (here; this is elsewhere)" in found.reason
    assert isinstance(store.find(CPU, "warm_latency"), Found)


def test_a_file_moved_to_another_place_is_refused(store):
    path = put(store, GPU)
    path.rename(path.with_name("bf16.json"))
    with pytest.raises(BaselineError, match=r"key\.variant.*'nvfp4'.*'bf16'"):
        store.find(structs.replace(GPU, variant="bf16"), "warm_latency")


def test_an_unreadable_file_is_an_error_not_absent(store):
    path = put(store, GPU)
    path.unlink()
    path.mkdir()
    put(store, structs.replace(GPU, variant="bf16"))
    with pytest.raises(BaselineError, match=r"nvfp4\.json"):
        store.find(GPU, "warm_latency")


def test_neighbours_are_the_other_variants_of_this_machine(store, tmp_path):
    put(store, CPU)
    put(store, structs.replace(CPU, variant="nvfp4"))
    broken = put(store, structs.replace(CPU, variant="fp8-cast"))
    broken.write_text("{")
    near = store.neighbours(CPU, "warm_latency")
    assert near.metrics == (WARM,)
    assert len(near.notes) == 1
    assert "fp8-cast.json" in near.notes[0]
    elsewhere = BaselineStore(tmp_path / "baselines", tmp_path / "local", catalog=CATALOG, machine="elsewhere")
    assert elsewhere.neighbours(CPU, "warm_latency").metrics == ()


def test_published_reference_of_another_engine(store):
    printed = MetricBaseline(unit="s", published=Published(n=10, mean=5.5, std=0.07))
    put(store, structs.replace(GPU, engine="comfyui"), stored=printed)
    reference = store.published_reference(GPU, "warm_latency")
    assert (reference.published.mean, reference.engine, reference.unit) == (5.5, "comfyui", "s")
    assert store.published_reference(GPU, "cold_load") is None
    assert store.published_reference(structs.replace(GPU, device="gb10"), "warm_latency") is None
    assert store.published_reference(structs.replace(GPU, workload="1024"), "warm_latency") is None


def test_own_runs_are_no_published_reference(store):
    put(store, structs.replace(GPU, engine="comfyui"))
    assert store.published_reference(GPU, "warm_latency") is None


# ---- writing ------------------------------------------------------------


def leftovers(path):
    return [entry.name for entry in path.parent.iterdir() if entry != path]


@pytest.mark.parametrize(("call", "code"), [("fsync", errno.ENOSPC), ("replace", errno.EROFS), ("fsync", errno.EDQUOT)])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(store, monkeypatch, call, code):
    path = put(store, GPU)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing.os, call, fail)
    with pytest.raises(BaselineError) as caught:
        put(store, GPU, stored=structs.replace(WARM, runs=(RUN,) * 6))
    assert str(path.parent) in caught.value.message
    assert os.strerror(code) in caught.value.message
    assert "--zimage-baselines" in caught.value.mend
    assert path.read_bytes() == before
    assert leftovers(path) == []


def test_a_file_system_that_really_stops_half_way(store, tmp_path):
    """The kernel refuses the write itself, after its first bytes, as a full disk does."""
    path = put(store, GPU)
    before = path.read_bytes()
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from pytest_zimage.baselines.writing import write_atomically\n"
        "from pytest_zimage.errors import BaselineError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n"
        "    write_atomically(Path(sys.argv[1]), b'x' * 10_000)\n"
        "except BaselineError as error:\n"
        "    print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written: File too large" in done.stdout
    assert path.read_bytes() == before
    assert leftovers(path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(store):
    path = put(store, GPU)
    path.parent.chmod(0o500)
    try:
        with pytest.raises(BaselineError, match="Permission denied"):
            put(store, GPU)
    finally:
        path.parent.chmod(0o700)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "baselines").write_text("a file where the folder should be")
    store = BaselineStore(tmp_path / "baselines", tmp_path / "local", catalog=CATALOG, machine="here")
    with pytest.raises(BaselineError, match="cannot be written: Not a directory"):
        put(store, GPU)


def test_a_read_only_file_system():
    """/proc refuses every new entry, to root as well."""
    store = BaselineStore(Path("/proc/self"), Path("/proc/self"), catalog=CATALOG, machine="here")
    with pytest.raises(BaselineError, match=r"/proc/self/h200.*cannot be written"):
        put(store, GPU)


def test_a_broken_file_is_never_merged_with(store):
    path = put(store, GPU)
    path.write_text("{")
    with pytest.raises(BaselineError, match="not JSON"):
        put(store, GPU)
    assert path.read_text() == "{"


def test_a_broken_file_may_be_replaced_and_is_kept_beside(store):
    path = put(store, GPU)
    path.write_text("{")
    store.rewrite(GPU, "device", lambda current: baseline(GPU, warm_latency=WARM), replace_unreadable=True)
    assert isinstance(store.find(GPU, "warm_latency"), Found)
    assert path.with_name("nvfp4.json.unreadable").read_text() == "{"


def test_a_file_of_a_newer_schema_is_never_replaced(store):
    path = put(store, GPU)
    newer = path.read_bytes().replace(b'"schema": 1', b'"schema": 99')
    path.write_bytes(newer)
    with pytest.raises(NewerSchemaError):
        store.rewrite(GPU, "device", lambda current: baseline(GPU, warm_latency=WARM), replace_unreadable=True)
    assert path.read_bytes() == newer


def test_nothing_to_write_leaves_the_file_alone(store):
    path = put(store, GPU)
    stamp = path.stat().st_mtime_ns
    store.rewrite(GPU, "device", lambda current: None)
    assert path.stat().st_mtime_ns == stamp


def test_sessions_that_update_at_once_lose_nothing(tmp_path):
    """Four processes each add five runs to the same metric, reading and writing the whole file."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from msgspec import structs\n"
        "from pytest_zimage.baselines.schema import *\n"
        "from pytest_zimage.baselines.store import BaselineStore\n"
        "from pytest_zimage.catalog import load_catalog\n"
        "root, number = Path(sys.argv[1]), int(sys.argv[2])\n"
        "key = Key(device='h200', engine='diffusers', model_set='official', workload='turbo-1024', variant='nvfp4')\n"
        "store = BaselineStore(root / 'baselines', root / 'local', catalog=load_catalog(), machine='here')\n"
        "def merge(current):\n"
        "    run = BaseRun(rounds=(float(number),), recorded_at='2026-01-31')\n"
        "    runs = (*(current.metrics['warm_latency'].runs if current else ()), run)\n"
        "    return Baseline(schema=1, key=key, provenance=Provenance(kind='measured'), reason='test',\n"
        "        recorded_at='2026-01-31', environment={},\n"
        "        metrics={'warm_latency': MetricBaseline(unit='s', runs=runs)})\n"
        "sys.stdin.read(1)\n"
        "for _ in range(5):\n"
        "    store.rewrite(key, 'device', merge)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    started = [subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE) for n in range(1, 5)]
    for process in started:
        process.stdin.write(b"x")
        process.stdin.flush()
    for process in started:
        process.communicate(timeout=60)
        assert process.returncode == 0
    store = BaselineStore(tmp_path / "baselines", tmp_path / "local", catalog=CATALOG, machine="here")
    runs = store.find(GPU, "warm_latency").metric.runs
    assert sorted(run.rounds[0] for run in runs) == [float(n) for n in range(1, 5) for _ in range(5)]
