"""Images are handed to the judge while a GPU draws the next ones; `QualityDesk.scores` then finds them scored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_zimage.catalog import Variant
from pytest_zimage.engines.protocol import DrawnImage
from pytest_zimage.errors import ZImageError
from pytest_zimage.images.gallery import by_pair

if TYPE_CHECKING:
    from pytest_zimage.images.desk import QualityDesk
    from pytest_zimage.session import ZImageSession

_HANDED_IN = 4
"""Images handed to the judge at a time while others are drawn: about what a GPU draws while it scores them."""


def scoring_meanwhile(session: ZImageSession, desk: QualityDesk, variant: Variant) -> Callable[[DrawnImage], None]:
    """What takes each image of `variant` as it arrives.

    Does nothing where drawing is the CPU's own work. Images wait until those of the reference are there too: another
    worker of the session may still be drawing them.
    """
    if session.machine.torch_device == "cpu":
        return lambda image: None
    itself = variant.name == variant.reference and not session.injection.quality
    references: dict[tuple[str, int], DrawnImage] = {}
    waiting: list[DrawnImage] = []

    def arrived(image: DrawnImage) -> None:
        waiting.append(image)
        # Its errors are told when the scores are collected.
        with contextlib.suppress(ZImageError):
            desk.judge.start()
            if len(waiting) % _HANDED_IN:
                return
            if itself:
                references.update(by_pair(waiting))
            elif not references:
                references.update(by_pair(desk.gallery.references_at_hand(variant) or ()))
            if references:
                held = [(one, references.get((one.prompt, one.seed))) for one in waiting]
                waiting.clear()
                desk.judge.submit(tuple(desk.item(one, against) for one, against in held if against is not None))

    return arrived
