"""A file of the synthetic set in GGUF: its header, written by hand, so that no package is needed to make one.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, with ComfyUI's tensor names and the
architecture that Z-Image's published files have. Vectors are F32 and what else is not quantised BF16, as ComfyUI-GGUF
converts.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pytest_zimage.checkpoints.synthetic.encodings import EncodedWeight
from pytest_zimage.checkpoints.synthetic.gguf_types import GgufBlocks
from pytest_zimage.checkpoints.synthetic.plan import FilePlan, Weight
from pytest_zimage.checkpoints.synthetic.storage import Stored

_ALIGNMENT = 32
_STRING = 8
"""Number of the metadata type."""
_TYPES = {"F32": 0, "Q5_0": 6, "Q8_0": 8, "Q4_K": 12, "BF16": 30}
"""Numbers of ggml's tensor types."""


@dataclass(frozen=True, slots=True)
class GgufPlan(FilePlan):
    """One GGUF file; every tensor's size is a multiple of the alignment, so that nothing lies between them."""

    @classmethod
    def of(cls, path: str, weights: tuple[Weight, ...]) -> GgufPlan:
        """The file at `path`; vectors among `weights` are held in F32."""
        held = tuple(w if len(w.shape) == 2 else Weight(w.name, w.shape, "f32") for w in weights)
        return cls("transformer", path, held)

    def header(self) -> tuple[bytes, dict[str, tuple[Stored, int]], int]:
        infos, relative, offset = b"", {}, 0
        for weight in self.weights:
            (tensor,) = weight.stored()
            # Dimensions from the innermost outwards.
            sizes = struct.pack(f"<I{len(weight.shape)}Q", len(weight.shape), *reversed(weight.shape))
            infos += _string(weight.name) + sizes + struct.pack("<IQ", _TYPES[_type(weight, tensor)], offset)
            relative[weight.name] = (tensor, offset)
            if tensor.nbytes % _ALIGNMENT:
                raise ValueError(f"{weight.name}: {tensor.nbytes} bytes are no multiple of {_ALIGNMENT}")
            offset += tensor.nbytes
        architecture = _string("general.architecture") + struct.pack("<I", _STRING) + _string("lumina2")
        start = b"GGUF" + struct.pack("<IQQ", 3, len(self.weights), 1) + architecture + infos
        start += bytes(-len(start) % _ALIGNMENT)
        return start, {name: (tensor, len(start) + at) for name, (tensor, at) in relative.items()}, len(start) + offset


def _type(weight: Weight, tensor: Stored) -> str:
    encoding = weight.encoding if isinstance(weight, EncodedWeight) else None
    return encoding.type_of(weight.shape) if isinstance(encoding, GgufBlocks) else tensor.dtype


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
