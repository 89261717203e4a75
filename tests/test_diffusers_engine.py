"""The in-worker engine: same seed, same pixels; times that add up; faults that really slow; images that are images."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from PIL import Image

from pytest_zimage.catalog import ROLE_FOLDERS, load_catalog
from pytest_zimage.checkpoints.synthetic.ensure import ensure_model_set
from pytest_zimage.engines import clock as clock_module
from pytest_zimage.engines import diffusers_engine
from pytest_zimage.engines.clock import DeviceClock
from pytest_zimage.engines.diffusers_engine import DiffusersEngine
from pytest_zimage.engines.drawing import to_pixels
from pytest_zimage.engines.protocol import Draw, Injection, Load, encode
from pytest_zimage.errors import EngineError, MeasurementError, UnsupportedError
from pytest_zimage.options import user_cache

CATALOG = load_catalog()
DIMS = CATALOG.models["synthetic-tiny"]


@pytest.fixture(scope="module")
def root() -> Path:
    folder = user_cache() / "synthetic-tiny"
    ensure_model_set("synthetic-tiny", DIMS, folder)
    return folder


@pytest.fixture
def request_for(root):
    def _request(name: str = "bf16", *, inject: Injection | None = None, device: str = "cpu", **workload) -> Load:
        variant = CATALOG.variant(name)
        return Load(
            variant=variant,
            workload=msgspec.structs.replace(CATALOG.workload("turbo-tiny"), **{"width": 64, "height": 64, **workload}),
            dims=DIMS,
            files={role: str(root / ROLE_FOLDERS[role][0] / file) for role, file in variant.files().items()},
            tokenizer=str(root / "tokenizer"),
            device=device,
            inject=inject or Injection(),
        )

    return _request


@pytest.fixture
def engine(request_for):
    def _engine(name: str = "bf16", **more) -> DiffusersEngine:
        engine = DiffusersEngine()
        engine.load(request_for(name, **more))
        return engine

    return _engine


def silent(stage: str, done: int, total: int) -> None:
    pass


# ---- images ---------------------------------------------------------------


def test_rounds_are_the_same_image_and_add_up(engine) -> None:
    drawn = engine().draw(Draw(3), silent)
    assert len({image.pixels_sha256 for image in drawn.rounds}) == 1
    phases = ["text_encode", *(f"step_{i}" for i in range(1, 9)), "vae_decode", "to_image"]
    for image in drawn.rounds:
        assert image.forwards == 8
        assert list(image.phases_s) == phases
        assert all(seconds > 0 for seconds in image.phases_s.values())
        assert sum(image.phases_s.values()) <= image.seconds
        assert sum(image.phases_s.values()) == pytest.approx(image.seconds, rel=0.05)


def test_seed_prompt_variant_sampler_and_size_each_change_the_image(engine) -> None:
    def pixels(name: str = "bf16", **workload) -> str:
        return engine(name, **workload).draw(Draw(1), silent).rounds[0].pixels_sha256

    images = {
        pixels(),
        pixels(seed=43),
        pixels(prompt="another one"),
        pixels("nvfp4"),
        pixels(sampler="euler"),
        pixels(width=128),
        pixels(guidance=2.0),
    }
    assert len(images) == 7


def test_a_fresh_process_draws_the_same_pixels(engine, request_for) -> None:
    script = (
        "import sys\n"
        "from pytest_zimage.engines.diffusers_engine import DiffusersEngine\n"
        "from pytest_zimage.engines.protocol import Draw, decode_request\n"
        "engine = DiffusersEngine()\n"
        "engine.load(decode_request(sys.stdin.buffer.readline()))\n"
        "print(engine.draw(Draw(1, first=True), lambda *_: None).rounds[0].pixels_sha256)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], input=encode(request_for("nvfp4-fp8e")), capture_output=True, check=True
    )
    here = engine("nvfp4-fp8e").draw(Draw(2), silent).rounds[1].pixels_sha256
    assert child.stdout.decode().split()[-1] == here


def test_saved_png_is_the_image_that_was_hashed(engine, tmp_path) -> None:
    path = tmp_path / "image.png"
    drawn = engine(width=96).draw(Draw(1, save=str(path)), silent)
    with Image.open(path) as image:
        assert image.size == (96, 64)
        assert hashlib.sha256(image.tobytes()).hexdigest() == drawn.rounds[0].pixels_sha256


def test_an_image_that_is_not_written_to_its_end_replaces_none(engine, tmp_path, monkeypatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"of an earlier session")

    def killed(image, target, **how) -> None:
        Path(target).write_bytes(b"half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        engine().draw(Draw(1, save=str(path)), silent)
    assert path.read_bytes() == b"of an earlier session"


def test_pixels_are_those_of_diffusers_own_image_processor(engine) -> None:
    loaded = engine()._loaded
    decoded = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(3)).bfloat16()
    theirs = loaded.pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
    assert to_pixels(decoded).numpy().tobytes() == theirs.tobytes()


def test_embedding_is_the_one_diffusers_pipeline_makes(engine) -> None:
    """Unpadded here, padded and masked there: equal but for the rounding of another matrix size."""
    loaded = engine()._loaded
    with torch.inference_mode():
        ours = loaded._encode("a small dog", replay=False)
        theirs = loaded.pipeline.encode_prompt("a small dog", device="cpu", do_classifier_free_guidance=False)[0][0]
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2)


def test_progress_is_told_between_images_only(engine, monkeypatch) -> None:
    running, told = [], []
    start, stop = DeviceClock.start, DeviceClock.stop
    monkeypatch.setattr(DeviceClock, "start", lambda self: (running.append(1), start(self))[1])
    monkeypatch.setattr(DeviceClock, "stop", lambda self: (running.clear(), stop(self))[1])
    engine().draw(Draw(2), lambda *said: told.append((said, bool(running))))
    assert told == [(("image", done, 2), False) for done in range(3)]


def test_every_forward_runs_under_inference_mode(engine) -> None:
    """Under `no_grad` comfy-kitchen silently dequantises an NVFP4 layer that has a bias."""
    loaded = engine()
    pipeline, modes = loaded._loaded.pipeline, []
    for network in (pipeline.transformer, pipeline.text_encoder.embed_tokens, pipeline.vae.decoder):
        network.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    loaded.draw(Draw(1), silent)
    assert modes == [True] * 10


# ---- refusals -------------------------------------------------------------


def test_nothing_is_drawn_before_a_load() -> None:
    with pytest.raises(EngineError, match="nothing is loaded"):
        DiffusersEngine().draw(Draw(1), silent)


def test_no_rounds_are_no_measurement(engine) -> None:
    with pytest.raises(MeasurementError, match="0 rounds"):
        engine().draw(Draw(0), silent)


def test_wrong_number_of_forwards_is_no_measurement(engine) -> None:
    loaded = engine()
    forwards = loaded._loaded.forwards
    loaded.pipeline.transformer.register_forward_pre_hook(lambda *_: setattr(forwards, "count", forwards.count + 1))
    with pytest.raises(MeasurementError, match="bf16: 16 transformer forwards for 8 steps"):
        loaded.draw(Draw(1), silent)


def test_image_with_nan_is_no_measurement(engine) -> None:
    loaded = engine()
    with torch.no_grad():
        loaded._loaded.pipeline.vae.decoder.conv_out.bias[1] = float("nan")
    with pytest.raises(MeasurementError, match="bf16: the image holds NaN"):
        loaded.draw(Draw(1), silent)


def test_kernel_that_fell_back_is_no_measurement(engine) -> None:
    loaded = engine()
    logger = logging.getLogger("comfy_kitchen.tensor.nvfp4")
    hook = loaded.pipeline.transformer.register_forward_pre_hook(
        lambda *_: logger.warning("NVFP4 scaled_mm failed: x, falling back to dequantization")
    )
    for _ in range(2):
        with pytest.raises(MeasurementError, match=r"bf16: 8 calls of scaled_mm_nvfp4 .* NVFP4 scaled_mm failed: x"):
            loaded.draw(Draw(1), silent)
    hook.remove()
    assert loaded.draw(Draw(1), silent).rounds


@pytest.mark.parametrize("device", ["cuda:63", "mps"])
def test_device_that_is_not_there(engine, device) -> None:
    with pytest.raises(UnsupportedError, match=device):
        engine(device=device)


# ---- faults on purpose ----------------------------------------------------


class Time:
    """A clock that moves only when told to, or when something waits for it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        # A tick, or a loop that waits for the clock would never end.
        self.now += 1e-9
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch) -> Time:
    time = Time()
    # Spinning to the exact end takes as many ticks as it takes; here all of a hold is slept.
    monkeypatch.setattr(clock_module, "_SLEEP_MARGIN_S", 0.0)
    monkeypatch.setattr(clock_module, "time", time)
    return time


@pytest.mark.parametrize("slow_by", [0.0, 0.05, 1.0])
def test_clock_lengthens_each_phase_by_its_own_share(time, slow_by) -> None:
    clock = DeviceClock(torch.device("cpu"), slow_by)
    for _ in range(2):
        clock.start()
        time.now += 2
        clock.mark("a")
        time.now += 0.5
        clock.mark("b")
        total, phases = clock.stop()
        assert phases == pytest.approx({"a": 2 * (1 + slow_by), "b": 0.5 * (1 + slow_by)}, abs=1e-6)
        assert total == pytest.approx(2.5 * (1 + slow_by), abs=1e-6)


def test_injected_latency_slows_rounds_and_not_the_first_image(engine, monkeypatch) -> None:
    held = []
    monkeypatch.setattr(clock_module, "hold", held.append)
    loaded = engine(inject=Injection(warm_latency=0.5))
    loaded.draw(Draw(1, first=True), silent)
    assert not held
    image = loaded.draw(Draw(1), silent).rounds[0]
    assert len(held) == len(image.phases_s)
    # `hold` was taken away, so each phase took just its own time.
    assert held == pytest.approx([0.5 * seconds for seconds in image.phases_s.values()], rel=0.2, abs=1e-4)


def test_injected_cold_load_slows_the_load_and_the_first_image(engine, request_for, monkeypatch) -> None:
    in_load, in_draw = [], []
    monkeypatch.setattr(diffusers_engine, "hold", in_load.append)
    monkeypatch.setattr(clock_module, "hold", in_draw.append)
    loaded = DiffusersEngine()
    reply = loaded.load(request_for(inject=Injection(cold_load=0.4)))
    assert in_load == pytest.approx([reply.load_s * 0.4 / 1.4])
    assert reply.load_s == pytest.approx(sum(reply.phases_s.values()))
    loaded.draw(Draw(1), silent)
    assert not in_draw
    loaded.draw(Draw(1, first=True), silent)
    assert len(in_draw) == 11


def test_injected_memory_is_held(request_for) -> None:
    loaded = DiffusersEngine()
    loaded.load(request_for(inject=Injection(memory_bytes=3_000_000)))
    assert sum(tensor.nbytes for tensor in loaded._ballast) == 3_000_000
    assert all(bool((tensor == 1).all()) for tensor in loaded._ballast)


def test_nothing_is_injected_by_default(engine, monkeypatch) -> None:
    monkeypatch.setattr(clock_module, "hold", lambda *_: pytest.fail("held"))
    monkeypatch.setattr(diffusers_engine, "hold", lambda *_: pytest.fail("held"))
    loaded = engine()
    loaded.draw(Draw(1, first=True), silent)
    loaded.draw(Draw(1), silent)
    assert not loaded._ballast
