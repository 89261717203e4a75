"""Files that convert-to-quant writes load as they come and draw as near to BF16 as they were measured to.

The tool runs here, once for all formats; without it these tests are skipped. Its mixed path needs a GPU and is not run.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_files import DIMS, latents, load, relative

from pytest_zimage.checkpoints.formats import detect
from pytest_zimage.checkpoints.header import read_header
from pytest_zimage.checkpoints.keymap import fused_name, transformer_to_comfy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("convert_to_quant") is None,
    reason="convert-to-quant is not installed: pip install convert-to-quant",
)

RUNS = {
    "nvfp4": ["--nvfp4", "--simple"],
    "mxfp8": ["--mxfp8", "--simple"],
    "fp8": ["--simple"],
    "int8": ["--int8", "--simple", "--convrot", "--convrot-group-size", "64", "--scaling_mode", "row"],
}
# Only from the learned path, which takes its time: one layer is enough.
LORA = ["--nvfp4", "--extract-lora", "--lora-rank", "8", "--lora-depth", "2", "--num_iter", "2"]
LORA += ["--exclude-layers", r"refiner|layers\.0|attention|w[13]"]
SCRIPT = """
import json, sys
from convert_to_quant.convert_to_quant import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`bf16`, of a network as torch initialises it, and what the tool makes of it."""
    folder = tmp_path_factory.mktemp("converted")
    torch.manual_seed(0)
    network = ZImageTransformer2DModel(**DIMS.transformer)
    for token in (network.x_pad_token, network.cap_pad_token):
        torch.nn.init.normal_(token)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in network.state_dict().items():
        fused = fused_name(name)
        if fused is None:
            tensors[transformer_to_comfy(name)] = value.bfloat16()
        else:
            tensors[fused[0]] = torch.cat([tensors.get(fused[0], value[:0].bfloat16()), value.bfloat16()])
    save_file(tensors, folder / "bf16.safetensors")
    # Its bias correction takes inputs of its own making, of which a few do here.
    ends = ["--comfy_quant", "--zimage", "--calib_samples", "64", "-i", str(folder / "bf16.safetensors"), "-o"]
    runs = [[*arguments, *ends, str(folder / f"{name}.safetensors")] for name, arguments in {**RUNS, "l": LORA}.items()]
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(runs)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def drawn_bf16(folder) -> torch.Tensor:
    return latents(load("bf16", {"transformer": folder / "bf16.safetensors"}))


@pytest.mark.parametrize(
    ("name", "format_", "distance"),
    # Relative errors of the latents as measured with the tool's files and another loader (dequantised products).
    [
        ("nvfp4", "nvfp4", 0.0266),
        ("mxfp8", "mxfp8", 0.0078),
        ("fp8", "float8_e4m3fn", 0.0068),
        ("int8", "int8_tensorwise", 0.0024),
    ],
)
def test_a_converted_file_loads_and_draws_as_near_as_was_measured(folder, drawn_bf16, name, format_, distance):
    path = folder / f"{name}.safetensors"
    data = path.read_bytes()
    found = detect(read_header(path), lambda tensor: data[tensor.begin : tensor.end])
    assert Counter(layer.format for layer in found.quantised.values()) == {format_: 20}
    loaded = load("bf16", {"transformer": path})
    assert loaded.compute["weight-only"] == 20
    # Other weights, prompt and noise than those of the measurement, so not its digits.
    assert relative(latents(loaded), drawn_bf16) == pytest.approx(distance, rel=0.3)


def test_its_lora_takes_error_away(folder, drawn_bf16):
    files = {"transformer": folder / "l.safetensors"}
    without, repaired = (load("bf16", {**files, **more}) for more in ({}, {"lora": folder / "l_lora.safetensors"}))
    assert repaired.compute == {**without.compute, "low-rank": 2}
    assert relative(latents(repaired), drawn_bf16) < relative(latents(without), drawn_bf16)
    factors = load_file(folder / "l_lora.safetensors")
    weight = load_file(folder / "bf16.safetensors")["layers.1.feed_forward.w2.weight"].float()
    held = without.pipeline.transformer.get_submodule("layers.1.feed_forward.w2").weight.dequantize().float()
    stem = "diffusion_model.layers.1.feed_forward.w2"
    change = factors[f"{stem}.lora_up.weight"] @ factors[f"{stem}.lora_down.weight"]
    assert (weight - held - change).norm() < 0.99 * (weight - held).norm()
