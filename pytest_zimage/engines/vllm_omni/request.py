"""One image of vLLM-Omni: what is asked for, field by field, and what the answer must be to count."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import msgspec
from msgspec import Struct

from pytest_zimage.catalog import Workload
from pytest_zimage.engines.vllm_omni.versions import Version
from pytest_zimage.errors import EngineError, MeasurementError, UnsupportedError

PATH = "/v1/images/generations"
_OVERHEAD_BYTES = 1 << 16
"""Of a PNG beside its rows; the server may compress them or not."""
_SHOWN = 300


class Picture(Struct, frozen=True):
    """One of `data`."""

    b64_json: str | None = None


class Figures(Struct, frozen=True):
    """What 0.26 and newer say of the image; durations in seconds, only with the server's profiler."""

    stage_durations: dict[str, float] | None = None
    peak_memory_mb: float | None = None


class Generated(Struct, frozen=True):
    """The answer, as far as it is read."""

    data: list[Picture]
    size: str | None = None
    output_format: str | None = None
    metrics: Figures | None = None


class _Error(Struct, frozen=True):
    message: str = ""


class _Refusal(Struct, frozen=True):
    """vLLM writes `error`, its framework `detail`."""

    error: _Error | None = None
    detail: str | list[dict[str, Any]] | None = None


def body(model: str, workload: Workload, version: Version, steps: int) -> dict[str, Any]:
    """Every field that decides about the picture: what is left out is not off, and differs between versions."""
    fields: dict[str, Any] = {
        "model": model,
        "prompt": workload.prompt,
        "n": 1,
        "size": f"{workload.width}x{workload.height}",
        "num_inference_steps": steps,
        "guidance_scale": workload.guidance,
        "seed": workload.seed,
        "response_format": "b64_json",
        "output_format": "png",
    }
    if version.takes_generator_device:
        fields["generator_device"] = "cpu"
    if workload.guidance > 0:
        fields["negative_prompt"] = workload.negative_prompt
    return fields


def most_bytes(workload: Workload) -> int:
    """The largest answer to expect: an uncompressed PNG of four channels, in base64, and what stands around it."""
    png = workload.height * (4 * workload.width + 1) + _OVERHEAD_BYTES
    return png * 4 // 3 + _OVERHEAD_BYTES


def image_of(answer: Generated, workload: Workload) -> bytes:
    """The file in the answer, its contents not looked at.

    Raises `EngineError` for an answer without exactly one image, `MeasurementError` for one of another size or kind.
    """
    size = f"{workload.width}x{workload.height}"
    if len(answer.data) != 1 or not answer.data[0].b64_json:
        raise EngineError(
            f"{PATH}: the answer holds {sum(bool(picture.b64_json) for picture in answer.data)} images, where 1 was due"
        )
    if answer.size is not None and answer.size != size:
        raise MeasurementError(
            f"{PATH}: asked for {size}, the server drew {answer.size[:20]!r}",
            mend="see whether --zimage-vllm-omni-flags limit the size of images",
        )
    if answer.output_format is not None and answer.output_format != "png":
        raise MeasurementError(f"{PATH}: asked for png, the server sent {answer.output_format[:20]!r}")
    text = answer.data[0].b64_json
    if len(text) > most_bytes(workload):
        raise EngineError(f"{PATH}: {len(text)} characters of base64 for an image of {size}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EngineError(f"{PATH}: the image is no base64: {error}") from error


def refusal(status: int, text: str) -> EngineError | UnsupportedError:
    """The error to raise for an answer of `status` 400 to 499: the server's own sentence, shortened."""
    said = _sentence(text)
    if status == 404:
        return UnsupportedError(
            f"{PATH}: the server knows no such path: it does not serve vLLM-Omni's images",
            mend="start it with `vllm serve MODEL --omni`",
        )
    return EngineError(
        f"{PATH}: the server refused the request with status {status}: {said}",
        mend="see the server's log; the request holds only what the workload says",
    )


def _sentence(text: str) -> str:
    try:
        found = msgspec.json.decode(text, type=_Refusal)
    except msgspec.MsgspecError:
        return repr(text[:_SHOWN])
    said = found.error.message if found.error is not None else found.detail
    if not isinstance(said, str) or not said:
        return repr(text[:_SHOWN])
    return "".join(character if character.isprintable() else " " for character in said[:_SHOWN])
