"""What one untimed image tells about its kernels: on the real tiny model, to the call."""

from __future__ import annotations

import logging
from collections import Counter

import comfy_kitchen as ck
import msgspec
import pytest
import torch
from comfy_kitchen.backends import eager
from comfy_kitchen.tensor import QuantizedTensor, fp8
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pytest_zimage.catalog import ROLE_FOLDERS, load_catalog
from pytest_zimage.checkpoints import loader, precision
from pytest_zimage.checkpoints.attention import FusedAttention
from pytest_zimage.checkpoints.linears import LinearModule, QuantisedActivationsLinear
from pytest_zimage.engines.diffusers_engine import DiffusersEngine
from pytest_zimage.engines.protocol import Draw, Injection, Load
from pytest_zimage.errors import MeasurementError, UnsupportedError
from pytest_zimage.probes.dispatch import DispatchTrace

CATALOG = load_catalog()
STEPS = CATALOG.workload("turbo-tiny").steps
DISPATCH = logging.getLogger("comfy_kitchen.dispatch")
ROPE = "rms_rope" if hasattr(ck, "rms_rope") else "apply_rope"


@pytest.fixture
def engine(tiny):
    def load(name: str, inject: Injection | None = None) -> DiffusersEngine:
        variant = CATALOG.variant(name)
        loaded = DiffusersEngine()
        loaded.load(
            Load(
                variant=variant,
                workload=msgspec.structs.replace(CATALOG.workload("turbo-tiny"), width=64, height=64),
                dims=CATALOG.models["synthetic-tiny"],
                files={role: str(tiny / ROLE_FOLDERS[role][0] / file) for role, file in variant.files().items()},
                tokenizer=str(tiny / "tokenizer"),
                device="cpu",
                inject=inject or Injection(),
            )
        )
        return loaded

    return load


@pytest.fixture
def native_fp8(monkeypatch):
    """The CPU multiplies FP8, slowly; here it does as a device that does so fast."""
    for module in (precision, loader):
        monkeypatch.setattr(module, "multiplies_natively", lambda format_, device: format_ == "float8_e4m3fn")


def linears(loaded: DiffusersEngine) -> Counter[str]:
    """The transformer's linears by how they say they compute."""
    return Counter(
        module.compute if isinstance(module, LinearModule) else "plain"
        for module in loaded.pipeline.transformer.modules()
        if isinstance(module, nn.Linear | LinearModule)
    )


def silent(*_: object) -> None:
    pass


def state() -> list[tuple[str, int, bool, list[logging.Handler]]]:
    names = sorted(name for name in logging.root.manager.loggerDict if name.startswith("comfy_kitchen"))
    loggers = [logging.getLogger(name) for name in names]
    assert DISPATCH in loggers
    return [(logger.name, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]


# ---- the map ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16", "fp8-cast", "fp8-scaled", "nvfp4"])
def test_each_linear_is_counted_once_a_step(engine, name) -> None:
    loaded = engine(name)
    found = loaded.trace().dispatch
    expected = {f"linear: {how}": number * STEPS for how, number in linears(loaded).items()}
    assert {key: number for key, number in found.items() if key.startswith("linear: ")} == expected
    blocks = sum(isinstance(module, FusedAttention) for module in loaded.pipeline.transformer.modules())
    assert found[f"{ROPE}: eager"] == blocks * STEPS


def test_weight_only_layers_are_dequantised_once_a_step(engine) -> None:
    loaded = engine("fp8-scaled")
    number = linears(loaded)["weight-only"] * STEPS
    assert number > 0
    traced = loaded.trace()
    assert traced.dispatch["dequantize_per_tensor_fp8: eager"] == number
    assert traced.dequantised == {}


def test_fp8_products_are_seen_though_no_log_has_them(engine, native_fp8) -> None:
    loaded = engine("fp8-cast-fast")
    number = linears(loaded)["quantised-activations"] * STEPS
    assert number > 0
    found = loaded.trace().dispatch
    assert found["scaled_mm_fp8: torch"] == found["linear: quantised-activations"] == number
    assert not [key for key in found if key.startswith("dequantize") or key.endswith("dequantised")]


def test_the_same_image_gives_the_same_map_and_the_map_the_same_image(engine) -> None:
    loaded = engine("nvfp4-fp8e")
    before = loaded.draw(Draw(1), silent).rounds[0].pixels_sha256
    assert loaded.trace() == loaded.trace()
    assert loaded.draw(Draw(1), silent).rounds[0].pixels_sha256 == before


def test_a_linear_that_was_not_seen_is_told() -> None:
    network = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    with torch.inference_mode(), DispatchTrace(network) as trace:
        network["used"](torch.ones(2, 4))
    assert trace.traced().dispatch == {"linear: plain": 1, "linear: not observed": 1}


# ---- what dequantised ---------------------------------------------------------


def test_a_layer_that_dequantises_without_a_word_is_named(engine, native_fp8, monkeypatch) -> None:
    loaded = engine("fp8-cast-fast")
    number = linears(loaded)["quantised-activations"]
    name = "layers.0.attention.qkv"
    broken = loaded.pipeline.transformer.get_submodule(name)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, broken.weight.dequantize().to(x.dtype))

    monkeypatch.setattr(broken, "forward", forward)
    traced = loaded.trace()
    assert traced.dequantised == {name: STEPS}
    assert traced.dispatch["linear: dequantised"] == STEPS
    assert traced.dispatch["linear: quantised-activations"] == (number - 1) * STEPS


def quantised_linear(layout: str) -> nn.Module:
    weight = QuantizedTensor.from_float(torch.randn(256, 128).bfloat16(), layout)
    module = QuantisedActivationsLinear(nn.Linear(128, 256, device="meta"))
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = nn.Parameter(torch.zeros(256).bfloat16(), requires_grad=False)
    return module


def test_a_product_that_fails_was_not_served_by_its_backend(monkeypatch) -> None:
    """The CPU refuses NVFP4 with another error than a GPU below compute capability 10.0 does."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(eager, "scaled_mm_nvfp4", refuse)
    network = nn.ModuleDict({"layer": quantised_linear("TensorCoreNVFP4Layout")})
    with torch.inference_mode(), DispatchTrace(network) as trace:
        network["layer"](torch.ones(16, 128).bfloat16())
    found = trace.traced()
    assert found.dispatch["scaled_mm_nvfp4: dequantised"] == 1
    assert found.dispatch["linear: dequantised"] == 1
    assert "scaled_mm_nvfp4: eager" not in found.dispatch
    with pytest.raises(MeasurementError, match=r"v: 1 calls of scaled_mm_nvfp4 .*NOT_SUPPORTED.*layer \(1 calls\)"):
        trace.refuse_fallbacks("v")


def test_an_operation_that_comfy_kitchen_does_not_handle_is_told() -> None:
    """Under `no_grad` NVFP4 with a bias arrives as `addmm`, which dequantises and says so at DEBUG only."""
    network = nn.ModuleDict({"layer": quantised_linear("TensorCoreNVFP4Layout")})
    with torch.no_grad(), DispatchTrace(network) as trace:
        network["layer"](torch.ones(16, 128).bfloat16())
    found = trace.traced().dispatch
    assert found["aten.addmm.default of TensorCoreNVFP4Layout: dequantised"] == 1
    assert found["linear: dequantised"] == 1
    trace.refuse_fallbacks("v")


# ---- faults on purpose ----------------------------------------------------------


def test_products_that_fail_on_purpose_refuse_the_image_and_name_the_layers(engine, native_fp8, monkeypatch) -> None:
    monkeypatch.setattr(fp8, "_fp8_scaled_mm", fp8._fp8_scaled_mm)  # put back afterwards
    loaded = engine("fp8-cast-fast", Injection(dispatch="dequantise"))
    number = linears(loaded)["quantised-activations"] * STEPS
    with pytest.raises(MeasurementError) as raised:
        loaded.draw(Draw(1, first=True), silent)
    message = raised.value.message
    assert f"fp8-cast-fast: {number} calls of scaled_mm_fp8 fell back to dequantising in one image" in message
    assert "fails on purpose" in message
    assert f"({STEPS} calls)" in message
    assert f"and {number // STEPS - 5} more" in message


@pytest.mark.parametrize(("name", "fault"), [("bf16", "dequantise"), ("nvfp4", "dequantise"), ("bf16", "fallback")])
def test_a_fault_that_would_change_nothing_is_refused(engine, monkeypatch, name, fault) -> None:
    """Only where the eager backend is all there is."""
    monkeypatch.setattr(ck, "list_backends", lambda: {"eager": {"available": True, "disabled": False}})
    with pytest.raises(UnsupportedError, match=f"dispatch={fault}"):
        engine(name, Injection(dispatch=fault))


def test_fallback_leaves_only_the_slowest_backend(engine, monkeypatch) -> None:
    backends = {
        name: {"available": name != "hip", "disabled": name == "triton"} for name in ("cuda", "eager", "triton")
    }
    disabled: list[str] = []
    monkeypatch.setattr(ck, "list_backends", lambda: {**backends, "hip": {"available": False, "disabled": False}})
    monkeypatch.setattr(ck, "disable_backend", disabled.append)
    engine("bf16", Injection(dispatch="fallback"))
    assert disabled == ["cuda"]


# ---- nothing is left behind -------------------------------------------------------


def test_loggers_are_as_they_were(engine) -> None:
    loaded = engine("bf16")
    DISPATCH.setLevel(logging.ERROR)
    logging.getLogger("comfy_kitchen.tensor").propagate = False
    logging.disable(logging.INFO)
    before = state()
    try:
        assert loaded.trace().dispatch[f"{ROPE}: eager"] > 0
        assert state() == before
        assert logging.root.manager.disable == logging.INFO
        with pytest.raises(ZeroDivisionError), DispatchTrace(loaded.pipeline.transformer):
            raise ZeroDivisionError
        assert state() == before
        assert _get_current_dispatch_mode() is None
    finally:
        logging.disable(logging.NOTSET)
        DISPATCH.setLevel(logging.NOTSET)
        logging.getLogger("comfy_kitchen.tensor").propagate = True


def test_no_timed_image_is_listened_to(engine) -> None:
    loaded = engine("bf16")
    seen: list[tuple[bool, bool]] = []

    def look(*_: object) -> None:
        seen.append((DISPATCH.isEnabledFor(logging.DEBUG), _get_current_dispatch_mode() is not None))

    loaded.pipeline.transformer.register_forward_pre_hook(look)
    loaded.draw(Draw(1), silent)
    assert set(seen) == {(False, False)}
    seen.clear()
    loaded.trace()
    assert set(seen) == {(True, True)}
    seen.clear()
    loaded.draw(Draw(1), silent)
    assert set(seen) == {(False, False)}


def test_warnings_still_reach_people(engine, caplog) -> None:
    loaded = engine("bf16")
    layer = next(iter(loaded.pipeline.transformer.layers))
    layer.register_forward_pre_hook(lambda *_: logging.getLogger("comfy_kitchen.tensor.fp8").warning("mind this"))
    with caplog.at_level(logging.DEBUG):
        loaded.trace()
    assert [record.message for record in caplog.records if record.name.startswith("comfy_kitchen")] == [
        "mind this"
    ] * STEPS


# ---- compiled -----------------------------------------------------------------------


def test_compiled_blocks_say_so_and_stay_compiled(engine, native_fp8) -> None:
    ran: list[int] = []

    def backend(graph, _inputs):
        def run(*args: object) -> object:
            ran.append(1)
            return graph.forward(*args)

        return run

    loaded = engine("fp8-cast-fast")
    number = linears(loaded)["quantised-activations"]
    for layer in loaded.pipeline.transformer.layers:
        layer.compile(backend=backend)
    loaded.draw(Draw(1), silent)
    ran.clear()
    loaded.draw(Draw(1), silent)
    graphs = len(ran)
    assert graphs > 0
    found = loaded.trace().dispatch
    assert found["compiled: modules"] == len(loaded.pipeline.transformer.layers)
    assert found["linear: compiled"] == sum(linears(loaded).values())
    assert found["scaled_mm_fp8: torch"] == number * STEPS
    assert "linear: quantised-activations" not in found
    ran.clear()
    loaded.draw(Draw(1), silent)
    assert len(ran) == graphs


@pytest.fixture(autouse=True)
def _graphs():
    yield
    torch._dynamo.reset()
