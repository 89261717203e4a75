"""The images of a session: which are drawn, where they are kept, and which of an earlier session may serve again.

Every variant is held against images of its reference (`Variant.reference`, as a rule bf16) of the same prompt and seed,
made in the same build and never with a fault in them. They are shared by all processes of a session.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from msgspec import structs

from pytest_zimage.catalog import Prompt, PromptSet, Variant
from pytest_zimage.engines.base import RunPlan
from pytest_zimage.engines.protocol import DrawImages, DrawnImage
from pytest_zimage.images.shelf import Shelf, open_shelf
from pytest_zimage.verdict.paired import seed_stages

if TYPE_CHECKING:
    from pytest_zimage.session import ZImageSession

Pairs = tuple[tuple[Prompt, int], ...]


class Gallery:
    """One per pytest process."""

    def __init__(self, session: ZImageSession) -> None:
        self._session = session

    @cached_property
    def prompts(self) -> PromptSet:
        return self._session.catalog.prompt_set(self._session.settings.prompts or self._session.engine.defaults.prompts)

    @property
    def stages(self) -> tuple[int, ...]:
        """How many further seeds a prompt gets, stage by stage."""
        return seed_stages(self.prompts)

    @property
    def seeds_at_once(self) -> int:
        """Further seeds a prompt that are drawn with the first ones: recording needs them all, a verdict seldom."""
        return self.stages[-1] if self._session.settings.update_baselines else 0

    def request(self, plan: RunPlan, more: int = 0) -> DrawImages:
        """The images that `plan` is to draw."""
        return self.shelf(plan).request(self.pairs(more))

    def shelf(self, plan: RunPlan) -> Shelf:
        """Where the images of `plan` lie, apart from those of every other build and engine."""
        session = self._session
        # What a server draws with is not known before it runs, so its images serve their own session only.
        build = session.engine.name if session.engine.images_last else f"{session.engine.name} {session.folder.name}"
        return open_shelf(
            session.settings.work / "images",
            plan.variant,
            self.prompts,
            plan.workload,
            {**plan.environment, "engine": build},
            plan.inject.quality,
        )

    def images(self, variant: Variant, more: int = 0) -> tuple[DrawnImage, ...]:
        """The variant's images of every prompt, with `more` further seeds each, in the order of the set."""
        session = self._session
        if session.wants_images:
            drawn = session.run(variant, 0).images
            self.shelf_of(variant).keep(drawn)
        else:
            drawn = self._draw(variant, self.pairs(self.seeds_at_once), f"{variant.name}-0")
        known = by_pair(drawn)
        wanted = self.pairs(more)
        if further := [(prompt, seed) for prompt, seed in wanted if (prompt.name, seed) not in known]:
            late = self._draw(variant, further, f"{variant.name}-{more}")
            known |= by_pair(late)
        return tuple(known[prompt.name, seed] for prompt, seed in wanted)

    def references(self, variant: Variant, more: int = 0) -> tuple[DrawnImage, ...]:
        """What the images of `variant` are held against: its reference's of the same prompts and seeds, without fault.

        Taken from the session's own run of the reference, else from an earlier session of the same build, else drawn.
        """
        session = self._session
        reference = session.catalog.variant(variant.reference)
        if reference in session.variants() and not session.injection.quality:
            return self.images(reference, more)
        pairs = self.pairs(more)
        return self.shelf_of(reference, clean=True).find(pairs) or self._draw(
            reference, pairs, f"{reference.name}-reference-{more}", clean=True
        )

    def references_at_hand(self, variant: Variant) -> tuple[DrawnImage, ...] | None:
        """The same of this session or of an earlier one of the same build, without drawing any."""
        session = self._session
        reference = session.catalog.variant(variant.reference)
        runs = [] if session.injection.quality else session.book.recorded(reference.name)
        images = runs[0].images if runs else self.shelf_of(reference, clean=True).find(self.pairs(0))
        return images or None

    def pairs(self, more: int) -> Pairs:
        """Every prompt with its seeds, and `more` further ones."""
        return self.prompts.pairs(more)

    def shelf_of(self, variant: Variant, *, clean: bool = False) -> Shelf:
        """The shelf of `variant`; `clean`: of its images without an injected fault."""
        return self.shelf(self._plan(variant, clean=clean))

    def _plan(self, variant: Variant, *, clean: bool) -> RunPlan:
        with self._session.reporting(variant.name) as progress:
            plan = self._session.plan(variant, 0, progress)
        return replace(plan, inject=structs.replace(plan.inject, quality="")) if clean else plan

    def _draw(
        self, variant: Variant, pairs: Sequence[tuple[Prompt, int]], name: str, *, clean: bool = False
    ) -> tuple[DrawnImage, ...]:
        plan = self._plan(variant, clean=clean)
        shelf = self.shelf(plan)
        with self._session.reporting(variant.name) as progress:
            plan = replace(plan, images=shelf.request(pairs), log=plan.log.with_name(f"{name}-images.log"))
            images = self._session.book.images(name, lambda: self._session.engine.draw(plan, progress), progress)
        shelf.keep(images)
        return images


def by_pair(images: Iterable[DrawnImage]) -> dict[tuple[str, int], DrawnImage]:
    """Images by prompt and seed."""
    return {(image.prompt, image.seed): image for image in images}
