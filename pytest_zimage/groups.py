"""What `--dist loadgroup` keeps on one worker: a variant's tests, those of its images apart."""

from __future__ import annotations

_IMAGES = "/images"


def group_of(variant: str, *, images: bool) -> str:
    """The group of the tests of `variant`, or of those that judge its images."""
    return variant + _IMAGES * images


def variant_of(group: str) -> str:
    return group.removesuffix(_IMAGES)


def judges_images(group: str) -> bool:
    return group.endswith(_IMAGES)


def without_group(nodeid: str) -> str:
    """A node id as xdist knows it, without the group behind it."""
    cut = nodeid.rfind("@")
    return nodeid[:cut] if cut > nodeid.rfind("]") else nodeid
