"""What a run knows of the pictures it got: each is the one asked for, and none is another one's from a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_zimage.catalog import Workload
from pytest_zimage.engines.servers.images import decoded
from pytest_zimage.engines.servers.session import Served
from pytest_zimage.errors import MeasurementError

if TYPE_CHECKING:
    from pytest_zimage.engines.servers.images import Pixels


class Pictures:
    """The pictures of one run."""

    def __init__(self, what: str) -> None:
        """`what` names the run in messages."""
        self._what = what
        self._drawn: dict[str, tuple[str, int]] = {}

    def checked(self, served: Served, workload: Workload) -> tuple[Pixels, str]:
        """The pixels and their sha256.

        Raises `MeasurementError` for a file that is not the PNG asked for, for a picture of one colour, and for one
        that another prompt or seed gave.
        """
        pixels, sha256 = decoded(served.image, workload.width, workload.height)
        asked = (workload.prompt, workload.seed)
        colour = pixels[0, 0]
        # Nearly every picture is known by its first row.
        if (pixels[0] == colour).all() and (pixels == colour).all():
            raise MeasurementError(
                f"{self._what}: {_named(*asked)} gave a picture of one colour, {tuple(colour.tolist())}: black is what"
                " values that are no numbers become",
                mend="look at the server's log; its files may be damaged, or it computes in too narrow a type",
            )
        other = self._drawn.setdefault(sha256, asked)
        if other != asked:
            raise MeasurementError(
                f"{self._what}: {_named(*other)} and {_named(*asked)} gave the same picture",
                mend="the server answers from a cache, or does not take the prompt and the seed",
            )
        return pixels, sha256


def _named(prompt: str, seed: int) -> str:
    return f"{prompt!r} from seed {seed}"
