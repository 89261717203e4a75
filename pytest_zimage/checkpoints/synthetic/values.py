"""Random weights from integer arithmetic: the same bits on every device and with every release of torch.

Element `i` of a tensor is a hash of `i` under keys derived from the tensor's name; the four bytes of the hash are
added, which gives a bell curve of standard deviation `sqrt(4 * (256**2 - 1) / 12)` about 510.
"""

from __future__ import annotations

import hashlib
import math

import torch

_MEAN = 510
_STD = math.sqrt(4 * (256**2 - 1) / 12)
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Elements made at a time: what stays in a processor's cache, or keeps a GPU busy."""
_NORM_SPREAD = 0.1
_BIAS_SPREAD = 0.02


def make_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The tensor `name` of `shape`: linears and convolutions of about `1 / sqrt(fan_in)`, norms near 1.

    Peak memory is the result and a chunk, whatever the size.
    """
    mean, std = _distribution(name, shape)
    out = torch.empty(math.prod(shape), dtype=dtype, device=device)
    chunk = _CHUNK.get(device.type, 1 << 18)
    for begin in range(0, out.numel(), chunk):
        end = min(begin + chunk, out.numel())
        part = _byte_sums(name, begin, end, device).sub_(_MEAN).to(torch.float32).mul_(std / _STD)
        out[begin:end] = part.add_(mean) if mean else part
    return out.reshape(shape)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if len(shape) == 1:
        return (0.0, _BIAS_SPREAD) if name.endswith(".bias") else (1.0, _NORM_SPREAD)
    if name.endswith("_pad_token") or name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))


def _byte_sums(name: str, begin: int, end: int, device: torch.device) -> torch.Tensor:
    """Sums of the four bytes of a 32-bit hash of each index; int32, 0 to 1020.

    The mixing is lowbias32 (https://nullprogram.com/blog/2018/07/31/) behind an affine step with keys of the name's
    own, so that two tensors are never shifted copies of each other. int32 products wrap on every device.
    """
    digest = hashlib.sha256(name.encode()).digest()
    factor, offset, key = (int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4, 8))
    x = torch.arange(begin, end, dtype=torch.int32, device=device)
    x.mul_(factor | 1).add_(offset)
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x.bitwise_xor_(_logical_shift(x, shift)).mul_(multiplier)
    x.bitwise_xor_(_logical_shift(x, 16)).bitwise_xor_(key)
    pairs = (x & 0x00FF00FF).add_((x >> 8).bitwise_and_(0x00FF00FF))
    return (pairs & 0xFFFF).add_(pairs >> 16)


def _logical_shift(x: torch.Tensor, by: int) -> torch.Tensor:
    # torch shifts int32 arithmetically; the mask removes the copies of the sign bit.
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)
