"""What only vLLM-Omni's log says: which attention kernels it resolved, and whether its version is vLLM's."""

from __future__ import annotations

import re

from pytest_zimage.catalog import Variant
from pytest_zimage.errors import MeasurementError, UnsupportedError

_BACKENDS = {"native": "TORCH_SDPA", "sage": "SAGE_ATTN", "flash": "FLASH_ATTN", "_native_cudnn": "CUDNN_ATTN"}
_LOGGED = (
    # 0.22 and newer, once for every role; then, before, by choice and by default.
    re.compile(r"Resolved diffusion attention backend '(\w{1,64})' for role="),
    re.compile(r"Using diffusion attention backend '(\w{1,64})'"),
    re.compile(r"Defaulting to diffusion attention backend (\w{1,64})"),
)
_SHORT = {"SDPA": "TORCH_SDPA"}
"""How old versions name it there."""
_OMNI_VERSION = re.compile(r"--> vLLM-Omni version ([^\s]{1,40})")


def backend_of(variant: Variant) -> str:
    """vLLM-Omni's name of the variant's attention. Raises `UnsupportedError` for one it has no name for."""
    if variant.attention not in _BACKENDS:
        raise UnsupportedError(
            f"{variant.name}: vLLM-Omni has no attention backend for {variant.attention!r}",
            mend=f"set the variant's attention to one of {', '.join(_BACKENDS)}",
        )
    return _BACKENDS[variant.attention]


def resolved_backends(text: str) -> tuple[str, ...]:
    """The attention backends that a log names as resolved, in order of their first line; empty: none."""
    for pattern in _LOGGED:
        if found := pattern.findall(text):
            return tuple(dict.fromkeys(_SHORT.get(name, name) for name in found))
    return ()


def check_backend(variant: Variant, text: str) -> str:
    """The backend that the server of `variant` resolved.

    Raises `MeasurementError` if it is not the variant's, or if the log does not say.
    """
    wanted, found = backend_of(variant), resolved_backends(text)
    if not found:
        raise MeasurementError(
            f"{variant.name}: the server's log does not say which attention backend it resolved, so nothing shows that"
            f" it is {wanted}",
            mend="let it log at INFO (VLLM_LOGGING_LEVEL), or start it yourself and attach: --zimage-vllm-omni-url",
        )
    if found != (wanted,):
        raise MeasurementError(
            f"{variant.name}: asked for attention backend {wanted}, the server resolved {', '.join(found)}",
            mend="install what that backend needs, take it out of --zimage-vllm-omni-flags, or measure a variant with"
            " another attention",
        )
    return wanted


def own_version(text: str) -> str:
    """vLLM-Omni's own version where the log says that it is not vLLM's; else empty."""
    match = _OMNI_VERSION.search(text)
    return match[1] if match else ""
