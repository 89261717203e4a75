"""LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924) by the lpips package, AlexNet, version 0.1.

The package reads its own linear layers with `torch.load`, and torchvision reads AlexNet the same way. Both files are
pickles, and nothing here unpickles:

* the linear layers are five rows of float32 in `lpips/weights/v0.1/alex.pth`. The file of lpips 0.1.4 is known by its
  hash, so its numbers are read as the bytes they are, at their known offsets; another file is refused;
* AlexNet comes from a safetensors file that the user made once from torchvision's pickle (`weights.find_alexnet` says
  how), since torchvision publishes no other format. Reading the pickle with `weights_only=True` would be a narrower
  unpickler, but an unpickler still; the user may decide that once for a file they trust, the judge does not.
"""

from __future__ import annotations

import hashlib
import warnings
from importlib.metadata import version
from pathlib import Path

import lpips
import numpy as np
import torch

from pytest_zimage.errors import CheckpointError, UnsupportedError
from pytest_zimage.quality import tiny
from pytest_zimage.quality.checks import Pixels
from pytest_zimage.quality.protocol import TINY_LPIPS, Scorer, ScorerChoice
from pytest_zimage.quality.weights import find_alexnet, load_safetensors, state_sha256

REAL = "alex"

_LINEAR_SHA256 = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
_LINEAR_ROWS = ((4721, 64), (1369, 192), (2145, 384), (3689, 256), (4985, 256))
"""Offset in bytes and number of float32 values of `lin0` to `lin4`."""
_CONVOLUTIONS = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
"""lpips' slice by the index of the convolution in torchvision's `features`."""


class LpipsScorer:
    """One LPIPS network."""

    def __init__(self, network: torch.nn.Module, device: torch.device, scorer: Scorer) -> None:
        self._network = network.to(device)
        self._device = device
        self.scorer = scorer

    def distances(self, images: list[Pixels], references: list[Pixels]) -> list[float]:
        """One distance a pair of `[H, W, 3]` uint8 images, all of one size; 0 for equal ones."""
        values = self._network(self._tensor(images), self._tensor(references))
        return [float(value) for value in values.flatten().tolist()]

    def _tensor(self, images: list[Pixels]) -> torch.Tensor:
        """`[n, 3, H, W]` in [-1, 1]."""
        stacked = torch.from_numpy(np.stack(images)).to(self._device)
        return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def open_lpips_scorer(choice: ScorerChoice, device: torch.device) -> LpipsScorer:
    """The LPIPS network that `choice.lpips` names, ready on `device`.

    Raises `UnsupportedError` for a name that is none, `MissingFileError` or `CheckpointError` for AlexNet's file.
    """
    if choice.lpips == TINY_LPIPS:
        backbone, source, prefix = tiny.alexnet(), "seeded values", "tiny-"
    elif choice.lpips == REAL:
        path = find_alexnet(choice.folder)
        backbone, source, prefix = load_safetensors(path), str(path), ""
    else:
        raise UnsupportedError(f"LPIPS has no network {choice.lpips!r} here", mend=f"use {REAL} or {TINY_LPIPS}")
    network = _build(backbone, source)
    sha256 = state_sha256(network.state_dict())
    scorer = Scorer(
        name="lpips",
        identity=f"{prefix}lpips/alex-v0.1@{sha256[:12]}",
        library=f"lpips {version('lpips')}",
        weights_sha256=sha256,
        source=source,
    )
    return LpipsScorer(network, device, scorer)


def _build(backbone: dict[str, torch.Tensor], source: str) -> torch.nn.Module:
    """The network with torchvision's AlexNet `backbone` (`features.0.weight`, ...; its classifier is not used)."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network: torch.nn.Module = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
    state = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("scaling_layer.")}
    for index, row in enumerate(linear_rows()):
        # lpips registers each layer under two names.
        state[f"lin{index}.model.1.weight"] = state[f"lins.{index}.model.1.weight"] = row
    for index, part in _CONVOLUTIONS.items():
        for kind in ("weight", "bias"):
            name = f"features.{index}.{kind}"
            if name not in backbone:
                raise CheckpointError(f"{source}: {name} is missing", mend="convert torchvision's AlexNet again")
            state[f"net.slice{part}.{index}.{kind}"] = backbone[name].float()
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{source}: is no AlexNet: {reason}", mend="convert torchvision's AlexNet again"
        ) from error
    return network.eval().requires_grad_(False)


def linear_rows() -> list[torch.Tensor]:
    """lpips' shipped linear layers, `[1, channels, 1, 1]` float32. Raises `UnsupportedError` for an unknown file."""
    path = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != _LINEAR_SHA256:
        raise UnsupportedError(
            f"{path}: is not the file this reader knows: {sha256[:12]}, not {_LINEAR_SHA256[:12]}",
            mend="install lpips 0.1.4 again",
        )
    return [
        torch.frombuffer(bytearray(data[offset : offset + 4 * count]), dtype=torch.float32).reshape(1, count, 1, 1)
        for offset, count in _LINEAR_ROWS
    ]
