"""Constants of the image checks, the controls and the parity of engines, from `limits.toml`: each with its reason."""

from __future__ import annotations

from importlib import resources

import msgspec
from msgspec import Struct

from pytest_zimage.errors import CatalogError


class ImageLimits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a file must be to count as an image at all."""

    min_std: float
    min_colours: int
    max_black_share: float
    max_saturated_share: float
    max_flat_lines_share: float


class ControlLimits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What makes CLIPScore fit to judge a prompt."""

    gap: float
    """On the scale of the cosine, -1 to 1."""


class ParityLimits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Least PSNR, in dB, between the pictures of two engines that compute in the same precision."""

    float32: float
    bfloat16: float


class Limits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of them."""

    image: ImageLimits
    controls: ControlLimits
    parity: ParityLimits


def load_limits() -> Limits:
    """The limits that come with the package. Raises `CatalogError` if their file was broken by hand."""
    text = resources.files("pytest_zimage.quality").joinpath("limits.toml").read_bytes()
    try:
        return msgspec.toml.decode(text, type=Limits)
    except msgspec.MsgspecError as error:
        raise CatalogError(f"quality/limits.toml: {error}", mend="install pytest-zimage again") from error
