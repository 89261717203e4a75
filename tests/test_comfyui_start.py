"""A ComfyUI started for a run: its command, what it sees, what happens when it does not start, and that it is gone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from standins.comfyui_plan import images_of, make_files, make_plan, make_settings, silent, variant, workload
from standins.comfyui_server import STANDIN, script_file

from conftest import TIMED
from pytest_zimage.engines.comfyui.engine import ComfyUIEngine
from pytest_zimage.engines.comfyui.launch import Launch, help_text
from pytest_zimage.engines.protocol import ImageJob, Injection
from pytest_zimage.errors import EngineError, MeasurementError, UnsupportedError

PYTHON = Path(sys.executable)
A100 = "NVIDIA A100-SXM4-80GB"
EVERY_FLAG = """usage: main.py [--listen [IP]] [--port PORT] [--output-directory OUTPUT_DIRECTORY] [--temp-directory T]
 [--input-directory I] [--user-directory USER] [--extra-model-paths-config PATH [PATH ...]] [--disable-auto-launch]
 [--preview-method [none,auto]] [--disable-metadata] [--disable-all-custom-nodes] [--disable-api-nodes]
 [--database-url DATABASE_URL] [--fp32-unet | --bf16-unet] [--use-sage-attention | --use-flash-attention]"""


@pytest.fixture
def models(tmp_path):
    return make_files(tmp_path / "models", "bf16", "nvfp4", "nvfp4-mixed-lora")


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Makes engines; when the test is over, no folder of a server may be left."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def make(*flags: str, **settings) -> ComfyUIEngine:
        return ComfyUIEngine(make_settings(tmp_path, **{"comfyui_dir": STANDIN, "comfyui_flags": flags, **settings}))

    yield make
    assert list(temporary.iterdir()) == []


# ---- the command --------------------------------------------------------------------


def test_the_command_keeps_everything_of_the_server_in_its_own_folder(models, home, tmp_path):
    plan = make_plan(models, tmp_path)
    command = Launch(plan, ("--fast",), PYTHON, EVERY_FLAG, home).command(4711)
    assert command[:3] == [str(PYTHON), "main.py", "--fast"]
    assert command[-4:] == ["--listen", "127.0.0.1", "--port", "4711"]
    for name in ("output", "temp", "user", "input"):
        assert command[command.index(f"--{name}-directory") + 1] == str(home / name)
        assert (home / name).is_dir()
    for flag in ("--disable-auto-launch", "--disable-metadata", "--disable-all-custom-nodes", "--disable-api-nodes"):
        assert flag in command
    assert command[command.index("--preview-method") + 1] == "none"
    assert command[command.index("--database-url") + 1] == "sqlite:///:memory:"
    assert "--cpu" in command


def test_a_flag_that_this_version_does_not_know_is_left_out(models, home, tmp_path):
    known = EVERY_FLAG.replace("[--disable-api-nodes]", "").replace("[--database-url DATABASE_URL]", "")
    command = Launch(make_plan(models, tmp_path), (), PYTHON, known, home).command(1)
    assert "--disable-api-nodes" not in command
    assert "--database-url" not in command
    assert "--disable-metadata" in command


def test_the_users_flags_are_not_doubled_and_do_not_open_another_address(models, home, tmp_path):
    flags = ("--listen", "0.0.0.0", "--lowvram", "--preview-method", "auto")
    command = Launch(make_plan(models, tmp_path), flags, PYTHON, EVERY_FLAG, home).command(5)
    assert command.count("--preview-method") == 1
    assert "--cpu" not in command, "it excludes --lowvram"
    # The last one counts.
    assert command[-4:] == ["--listen", "127.0.0.1", "--port", "5"]


def test_the_server_sees_the_variants_files_and_no_others(models, home, tmp_path):
    chosen = variant("nvfp4-mixed-lora")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    launch = Launch(make_plan(models, tmp_path, chosen, tokenizer=tokenizer), (), PYTHON, EVERY_FLAG, home)
    paths = json.loads((home / "model_paths.yaml").read_text())["zimage"]
    assert paths.pop("is_default") is True
    base = Path(paths.pop("base_path"))
    seen = {folder: [path.name for path in (base / below).iterdir()] for folder, below in paths.items()}
    assert seen == {
        "diffusion_models": [chosen.transformer],
        "text_encoders": [chosen.text_encoder],
        "vae": [chosen.vae],
        "loras": [chosen.lora],
    }
    assert launch.names == chosen.files()
    assert (base / "vae" / chosen.vae).read_bytes() == (models / "vae" / chosen.vae).read_bytes()
    assert (base / "tokenizer").resolve() == tokenizer


def test_a_flag_that_the_variant_needs_must_be_there(models, home, tmp_path):
    plan = make_plan(models, tmp_path, variant(compute_dtype="float32", attention="flash"))
    command = Launch(plan, ("--fp32-unet",), PYTHON, EVERY_FLAG, home).command(1)
    assert command.count("--fp32-unet") == 1
    assert "--use-flash-attention" in command
    other = make_plan(models, tmp_path, variant(vae_dtype="float32"))
    (home / "again").mkdir()
    with pytest.raises(UnsupportedError, match="this version of ComfyUI has no --fp32-vae, which the variant needs"):
        Launch(other, (), PYTHON, EVERY_FLAG, home / "again")


def test_what_is_no_comfyui_says_what_to_check(tmp_path):
    (tmp_path / "main.py").write_text("import nothing_like_it")
    with pytest.raises(EngineError, match=r"(?s)does not list its flags; exit status 1: .*nothing_like_it") as caught:
        help_text(PYTHON, tmp_path)
    assert "--zimage-comfyui-python" in caught.value.mend
    with pytest.raises(EngineError, match=r"cannot be run: .*No such file"):
        help_text(tmp_path / "python", tmp_path)


# ---- a run ------------------------------------------------------------------------


def left() -> list[str]:
    """Processes below this one."""
    return [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]


def test_a_run_starts_a_server_and_leaves_nothing(engine, models, tmp_path, nothing_left):
    job = ImageJob(prompt="red", text="a red bicycle", seed=3, path=str(tmp_path / "images" / "red.png"))
    arrived = []
    plan = make_plan(models, tmp_path, images=images_of(tmp_path / "images", job), arrived=arrived.append)
    record = engine().run(plan, silent)
    assert left() == []
    assert record.engine == "comfyui"
    assert record.cold.phases_s.keys() == {"server_start", "first_image"}
    assert record.cold.total_s == record.cold.phases_s["first_image"]
    assert record.cold.phases_s["server_start"] > 0
    assert record.rss_idle_bytes <= record.memory.rss_sampled_peak_bytes
    assert record.disk_bytes == sum(path.stat().st_size for path in plan.files.values())
    assert [image.prompt for image in record.images] == ["red"] == [image.prompt for image in arrived]
    assert Path(job.path).is_file()
    assert record.emulated == ("mxfp8", "nvfp4")
    assert record.environment["comfyui.native_ops"] == "convrot_w4a4, float8_e4m3fn, int8_tensorwise"
    assert record.environment["comfyui.comfy-kitchen"] == "0.2.40"
    log = plan.log.read_text()
    assert "ComfyUI version: 0.33.0" in log


def test_two_runs_have_the_same_environment_whatever_port_and_folder_they_had(engine, models, tmp_path):
    made = engine()
    first, second = (made.run(make_plan(models, tmp_path, rounds=1, index=i), silent) for i in range(2))
    assert first.environment == second.environment
    assert "--disable-metadata" in first.environment["comfyui.argv"]
    assert first.rounds[0].pixels_sha256 == second.rounds[0].pixels_sha256


def test_images_alone_are_drawn_without_any_round(engine, models, tmp_path):
    jobs = [
        ImageJob(prompt=str(i), text="a red bicycle", seed=i, path=str(tmp_path / "i" / f"{i}.png")) for i in range(3)
    ]
    images = engine().draw(make_plan(models, tmp_path, images=images_of(tmp_path / "i", *jobs)), silent)
    assert len({image.pixels_sha256 for image in images}) == 3
    assert left() == []


def test_a_server_that_is_busy_starting_is_waited_for(engine, models, tmp_path):
    script = script_file(tmp_path, start={"busy": 3})
    record = engine("--fault-script", str(script)).run(make_plan(models, tmp_path), silent)
    assert record.faults == {}


def test_a_server_that_ends_while_it_starts_is_an_error_with_its_log(engine, models, tmp_path):
    script = script_file(tmp_path, start={"dies": 7})
    with pytest.raises(
        EngineError, match=r"(?s)bf16, run 1: the server left with exit status 7.*ComfyUI version: 0\.33"
    ):
        engine("--fault-script", str(script)).run(make_plan(models, tmp_path), silent)
    assert left() == []


def test_a_flag_that_the_server_refuses_is_shown_in_its_own_words(engine, models, tmp_path):
    with pytest.raises(EngineError, match=r"(?s)exit status 2.*unrecognized arguments: --no-such-flag"):
        engine("--no-such-flag").run(make_plan(models, tmp_path), silent)


@pytest.mark.parametrize(("fault", "how"), [("die", "left with exit status 3"), ("killed", "was killed by SIGKILL")])
def test_a_server_that_dies_while_it_draws_is_an_error_with_its_log(engine, models, tmp_path, fault, how):
    script = script_file(tmp_path, at={"2": fault})
    with pytest.raises(EngineError, match=f"(?s)ComfyUI with bf16, run 1: the server {how}.*Requested to load Lumina2"):
        engine("--fault-script", str(script)).run(make_plan(models, tmp_path), silent)
    assert left() == []


def test_an_accident_in_the_cold_load_starts_another_server(engine, models, tmp_path):
    script = script_file(tmp_path, at={"0": "drop_answer"}, start={"once": True})
    plan = make_plan(models, tmp_path)
    record = engine("--fault-script", str(script)).run(plan, silent)
    assert record.faults == {"dropped connection": 1}
    assert plan.log.read_text().count("ComfyUI version: 0.33.0") == 2
    assert record.cold.phases_s["first_image"] == record.cold.total_s
    assert left() == []


def test_a_version_that_gives_its_own_ids_is_understood(engine, models, tmp_path):
    assert len(engine("--own-ids").run(make_plan(models, tmp_path), silent).rounds) == 3


def test_a_server_that_caches_nothing_is_refused(engine, models, tmp_path):
    with pytest.raises(MeasurementError, match="loaded its weights again"):
        engine("--cache-none").run(make_plan(models, tmp_path), silent)


def test_a_slower_server_is_slower_by_what_was_injected(engine, models, tmp_path):
    plan = make_plan(models, tmp_path, rounds=5, inject=Injection(warm_latency=1.0), workload=workload(steps=8))
    made = engine("--step-ms", "10")
    slow = made.run(plan, silent).rounds
    plain = made.run(make_plan(models, tmp_path, rounds=5), silent).rounds
    assert sum(one.seconds for one in slow) > 1.5 * sum(one.seconds for one in plain)


@pytest.mark.parametrize(
    ("flags", "capability", "dynamic_vram", "where"),
    [
        (("--gpu", "NVIDIA H200"), "9.0", "enabled", "under dynamic VRAM, which --disable-dynamic-vram turns off"),
        (("--gpu", "NVIDIA H200", "--disable-dynamic-vram"), "9.0", "disabled", None),
        (("--gpu", A100), "8.0", "enabled", "on a GPU of compute capability 8.0, below 8.9"),
        ((), "", None, "on a CPU"),
    ],
)
def test_a_fast_cast_that_is_a_plain_one_is_told_with_the_reason(
    engine, models, tmp_path, flags, capability, dynamic_vram, where
):
    named = {"device": flags[1], "device_capability": capability} if flags else {}
    given = {"device": "cuda:0" if flags else "cpu", "environment": named, "rounds": 1}
    made = engine(*flags)
    cast, fast = (
        made.run(make_plan(models, tmp_path, variant(name), **given), silent) for name in ("fp8-cast", "fp8-cast-fast")
    )
    assert (cast.rounds[0].pixels_sha256 == fast.rounds[0].pixels_sha256) is (where is not None)
    assert [why.partition(": ")[0] for why in fast.unquantised] == ([f"fp8_e4m3fn_fast {where}"] if where else [])
    assert cast.unquantised == ()
    assert fast.environment.get("comfyui.dynamic_vram") == dynamic_vram


# ---- through pytest -----------------------------------------------------------------

SUITE = f"""{TIMED}
def test_memory(zimage):
    zimage.gate(zimage.rss_peak())
"""


@pytest.fixture
def suite(project, tiny):
    # A cache of its own, and so a lock of its own: nobody waits for a measurement beside this.
    cache = project.mkdir("cache")
    (cache / "synthetic-tiny").symlink_to(tiny)
    project.makeini(f"[pytest]\nzimage_cache = {cache}\nzimage_device = cpu\naddopts = -p no:cacheprovider\n")
    project.makepyfile(test_suite=SUITE)

    def run(names: str, *arguments: str):
        return project.runpytest_subprocess(
            "--zimage-engine=comfyui", f"--zimage-comfyui-dir={STANDIN}", f"--zimage-config={names}", *arguments
        )

    return run


def test_a_session_measures_records_and_judges(suite, results):
    """Steps so long that no neighbour on this machine makes them four times as long."""
    again = ("nvfp4", "--zimage-rounds=2", "-k", "warm")
    recorded = suite(*again, "--zimage-comfyui-flags=--step-ms 10", "--update-baselines", "--update-reason=first")
    recorded.assert_outcomes(passed=1, deselected=2)
    runs = results()["runs"]
    assert len(runs) >= 5, "and one more for each that lay far out on a busy machine"
    assert {run["engine"] for run in runs} == {"comfyui"}
    assert {"plugin", "commit", "machine", "comfyui", "comfyui.torch"} <= runs[0]["environment"].keys()
    ours = {"python", "torch", "diffusers", "transformers", "comfy-kitchen", "comfy-kitchen_wheel"}
    assert not ours & runs[0]["environment"].keys(), "what is installed beside the tests does not draw"
    assert not ours & results()["environment"].keys()
    judged = suite(*again, "--zimage-comfyui-flags=--step-ms 40")
    assert judged.ret == pytest.ExitCode.TESTS_FAILED
    judged.stdout.fnmatch_lines(["*SLOWER*", "*comfyui.argv*--step-ms 10*--step-ms 40*"])
    assert "Traceback" not in judged.stdout.str()


def test_a_fast_cast_on_a_cpu_is_not_quantised_and_the_reason_is_told(suite, project):
    shutil.copy(Path(__file__).parents[1] / "suites" / "test_dispatch.py", project.path / "test_suite.py")
    done = suite("fp8-cast-fast", "--zimage-rounds=2", "-k", "quantised")
    done.assert_outcomes(failed=1, deselected=1)
    done.stdout.fnmatch_lines(
        [
            "fp8-cast-fast quantised_layers: NOT QUANTISED*",
            "*fp8_e4m3fn_fast on a CPU: ComfyUI casts and multiplies in *",
        ]
    )


def test_an_error_is_the_tests_and_the_next_variant_is_measured(suite, project, results):
    script = script_file(project.path, at={"3": "error"}, start={"once": True})
    done = suite("bf16,nvfp4", f"--zimage-comfyui-flags=--fault-script {script}")
    done.stdout.fnmatch_lines(["*node 8 (KSampler) failed: RuntimeError: mat1 and mat2 shapes*", "  mend: *"])
    assert "Traceback (most" not in done.stdout.str()
    assert {error["variant"] for error in results()["errors"]} == {"bf16"}
    assert [run["variant"] for run in results()["runs"]] == ["nvfp4"]


def test_importing_the_engine_loads_neither_torch_nor_diffusers():
    script = """
import sys
import pytest_zimage.engines.comfyui.engine
print([name for name in ("torch", "diffusers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
