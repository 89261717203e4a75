"""Weights for the `tiny-` scorers: the same bits on every machine, for where real weights cannot be had.

They know nothing of pictures or words. Their scores move when an image or a text changes, and stay when nothing does,
which is what the gate's own machinery needs; they must never be compared with scores of trained weights, and their
names see to that.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import open_clip
import torch

from pytest_zimage.checkpoints.synthetic.values import make_weight

CLIP_ARCH = "ViT-tiny-16"
SEED_NAME = "seed-1"
"""Changes whenever the recipe of the weights does; the hash in the identity would tell anyway."""

_CLIP_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
_ALEXNET_SHAPES = {
    0: (64, 3, 11, 11),
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}
_ALEXNET_BIAS = -0.5
_CPU = torch.device("cpu")


def write_clip(folder: Path) -> Path:
    """Make `CLIP_ARCH` known to open_clip and write its weights below `folder`; the path of the weights."""
    from safetensors.torch import save_file

    config = folder / f"{CLIP_ARCH}.json"
    config.write_text(json.dumps(_CLIP_CONFIG), encoding="utf-8")
    open_clip.add_model_config(config)
    state = open_clip.CLIP(**open_clip.get_model_config(CLIP_ARCH)).state_dict()
    path = folder / f"{CLIP_ARCH}.safetensors"
    save_file({name: _clip_weight(name, tuple(tensor.shape)) for name, tensor in state.items()}, path)
    return path


def _clip_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name == "logit_scale":
        return torch.tensor(math.log(1 / 0.07))
    return make_weight(name, shape, torch.float32, _CPU)


def alexnet() -> dict[str, torch.Tensor]:
    """The convolutions of torchvision's AlexNet under its own names.

    Filters that answer to a flat field all see the same brightness and hardly tell two pictures apart: noise of 5 %
    moved the distance by 0.007. So every filter is made odd, the first in space and the others across their inputs, by
    differences of pairs, which are exact, and a negative bias keeps the answers sparse as trained ones are: then noise
    of 5 % moves it by 0.15.
    """
    state = {}
    for index, shape in _ALEXNET_SHAPES.items():
        weight = make_weight(f"tiny-alex.features.{index}.weight", shape, torch.float32, _CPU)
        state[f"features.{index}.weight"] = weight - weight.flip((2, 3) if index == 0 else (1,))
        state[f"features.{index}.bias"] = torch.full((shape[0],), _ALEXNET_BIAS)
    return state
