"""Images are handed to the judge while a GPU draws the next ones; `QualityDesk.scores` then finds them scored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_zimage.catalog import Variant
from pytest_zimage.engines.protocol import DrawnImage
from pytest_zimage.errors import ZImageError
from pytest_zimage.images.gallery import by_pair
from pytest_zimage.quality.protocol import Item

if TYPE_CHECKING:
    from pytest_zimage.images.desk import QualityDesk
    from pytest_zimage.session import ZImageSession

_HANDED_IN = 4
"""Images handed to the judge at a time while others are drawn: about what a GPU draws while it scores them."""


def scoring_meanwhile(session: ZImageSession, desk: QualityDesk, variant: Variant) -> Callable[[DrawnImage], None]:
    """What takes each image of `variant` as it arrives.

    Does nothing where drawing is the CPU's own work, and where the reference's images would have to be drawn first.
    """
    if session.machine.torch_device == "cpu":
        return lambda image: None
    itself = variant.name == variant.reference and not session.injection.quality
    at_hand = () if itself else desk.gallery.references_at_hand(variant)
    if at_hand is None:
        return lambda image: None
    known = by_pair(at_hand)
    waiting: list[Item] = []

    def arrived(image: DrawnImage) -> None:
        reference = image if itself else known.get((image.prompt, image.seed))
        if reference is not None:
            waiting.append(desk.item(image, reference))
        if len(waiting) >= _HANDED_IN:
            # Its errors are told when the scores are collected.
            with contextlib.suppress(ZImageError):
                desk.judge.submit(tuple(waiting))
            waiting.clear()

    return arrived
