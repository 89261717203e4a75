"""How long a run will take and how much it loads, as far as that is known before it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from pytest_zimage.baselines.store import Absent
from pytest_zimage.baselines.update import centre
from pytest_zimage.checkpoints.folders import bytes_on_disk
from pytest_zimage.errors import BaselineError, ZImageError

if TYPE_CHECKING:
    from pytest_zimage.catalog import Variant
    from pytest_zimage.session import ZImageSession


@dataclass(frozen=True)
class Duration:
    """Of one run."""

    seconds: float
    """Infinite where it is not known."""
    source: str
    """Where the figure is from, or why there is none."""


@dataclass(frozen=True)
class Weight:
    """What xdist's scheduler may know of a variant's run."""

    load_bytes: int = 0
    """Size of its files; 0: not known."""
    run_s: float = math.inf
    """How long it takes; infinite: not known."""


def run_duration(session: ZImageSession, variant: Variant, *, images: int = 0) -> Duration:
    """What this device recorded or somebody published for `variant`, with `images` drawn beside the timed rounds."""
    seconds: dict[str, float] = {}
    source = "recorded here"
    for name in ("cold_load", "warm_latency"):
        try:
            found = session.store.find(session.key(variant), name)
        except BaselineError as error:
            return Duration(math.inf, error.message)
        if isinstance(found, Absent):
            reference = session.store.published_reference(session.key(variant), name)
            if reference is None:
                return Duration(math.inf, "nothing recorded on this device yet")
            seconds[name], source = reference.published.mean, f"published for {reference.engine}"
        else:
            value = centre(found.metric)
            assert isinstance(value, float)
            seconds[name] = value
    drawn = session.settings.rounds + images
    return Duration(seconds["cold_load"] + drawn * seconds["warm_latency"], source)


def weigh(session: ZImageSession, name: str, *, images: bool) -> Weight:
    """Of the variant `name`, whose run draws images for quality too if `images`.

    Nothing is known of one that is not here, as on a controller without weights.
    """
    try:
        variant = session.catalog.variant(name)
        gallery = session.desk.gallery
        count = len(gallery.pairs(gallery.seeds_at_once)) if images else 0
        load_bytes = sum(map(bytes_on_disk, session.model_set.files(variant).values()))
        return Weight(load_bytes, run_duration(session, variant, images=count).seconds)
    except (ZImageError, OSError, pytest.UsageError):
        return Weight()
