"""The image quality of a session: which images are drawn, what they are held against, and what the judge says of them.

Every variant is held against bf16 images of the same prompt and seed, made in the same build and never with a fault in
them. Controls are scored on those too, since they ask whether the scorer is fit, not whether the variant is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from msgspec import structs

from pytest_zimage.baselines.quality import Evidence, drawn_pairs, drawn_prompts
from pytest_zimage.catalog import Prompt, PromptSet, Variant
from pytest_zimage.engines.base import RunPlan
from pytest_zimage.engines.protocol import DrawImages, DrawnImage
from pytest_zimage.errors import CatalogError, ZImageError
from pytest_zimage.imaging import Shelf, image_size, open_shelf
from pytest_zimage.quality.client import Judge
from pytest_zimage.quality.controls import ControlOutcome, judge_controls
from pytest_zimage.quality.limits import load_limits
from pytest_zimage.quality.protocol import (
    TINY_CLIP,
    TINY_LPIPS,
    Comparison,
    ControlPrompt,
    ImageScore,
    Item,
    PathPair,
    PreviewJob,
    ScorerChoice,
    ScorerName,
)
from pytest_zimage.verdict.paired import Scores, pair_name, seed_stages

if TYPE_CHECKING:
    from pytest_zimage.session import ZImageSession

REFERENCE = "bf16"
_HANDED_IN = 4
"""Images handed to the judge at a time while others are drawn: about what a GPU draws while it scores them."""
_SCORERS: dict[str, ScorerName] = {"clip_score": "clip_score", "lpips": "lpips", "psnr": "psnr_db", "ssim": "ssim"}


class QualityDesk:
    """One per pytest process; the images and scores are shared by all processes of a session."""

    def __init__(self, session: ZImageSession) -> None:
        self._session = session
        self._evidence: dict[tuple[str, int], Evidence] = {}

    @cached_property
    def prompts(self) -> PromptSet:
        return self._session.catalog.prompt_set(self._session.settings.prompts)

    @property
    def stages(self) -> tuple[int, ...]:
        """How many further seeds a prompt gets, stage by stage."""
        return seed_stages(self.prompts)

    @cached_property
    def judge(self) -> Judge:
        settings = self._session.settings
        synthetic = self._session.model_set.name.startswith("synthetic-")
        choice = ScorerChoice(
            clip=settings.clip or (TINY_CLIP if synthetic else "ViT-B-32"),
            lpips=settings.lpips or (TINY_LPIPS if synthetic else "alex"),
            folder=str(settings.scorers or ""),
            allow_download=settings.allow_download,
        )
        return Judge(
            choice,
            log=self._session.folder / "logs" / f"judge-{os.getpid()}.log",
            timeout_s=settings.timeout_s,
            progress=lambda stage, done, total: self._session.progress.update("quality judge", 1, stage, done, total),
            cache=self._session.folder / "scores",
        )

    def close(self) -> None:
        """End the judge, if there is one."""
        if "judge" in vars(self):
            self.judge.end()

    def request(self, plan: RunPlan, more: int = 0) -> DrawImages:
        """The images that `plan` is to draw."""
        return self.shelf(plan).request(self._pairs(more))

    def shelf(self, plan: RunPlan) -> Shelf:
        return open_shelf(
            self._session.settings.work / "images",
            plan.variant,
            self.prompts,
            plan.workload,
            plan.environment,
            plan.inject.quality,
        )

    def images(self, variant: Variant, more: int = 0) -> tuple[DrawnImage, ...]:
        """The variant's images of every prompt, with `more` further seeds each, in the order of the set."""
        session = self._session
        if session.wants_images:
            drawn = session.run(variant, 0).images
            self._shelf_of(variant).keep(drawn)
        else:
            drawn = self._draw(variant, self._pairs(self.seeds_at_once), f"{variant.name}-0")
        known = _by_pair(drawn)
        wanted = self._pairs(more)
        if further := [(prompt, seed) for prompt, seed in wanted if (prompt.name, seed) not in known]:
            late = self._draw(variant, further, f"{variant.name}-{more}")
            known |= _by_pair(late)
        return tuple(known[prompt.name, seed] for prompt, seed in wanted)

    @property
    def seeds_at_once(self) -> int:
        """Further seeds a prompt that are drawn with the first ones: recording needs them all, a verdict seldom."""
        return self.stages[-1] if self._session.settings.update_baselines else 0

    def references(self, more: int = 0) -> tuple[DrawnImage, ...]:
        """The bf16 images of the same prompts and seeds, without any injected fault.

        Taken from the session's own bf16 run, else from an earlier session of the same build, else drawn.
        """
        session = self._session
        variant = session.catalog.variant(REFERENCE)
        if variant in session.variants() and not session.injection.quality:
            return self.images(variant, more)
        pairs = self._pairs(more)
        return self._shelf_of(variant, clean=True).find(pairs) or self._draw(
            variant, pairs, f"{REFERENCE}-reference-{more}", clean=True
        )

    def evidence(self, variant: Variant, more: int = 0) -> Evidence:
        """Everything the session knows of the variant's images, with `more` further seeds a prompt."""
        if (variant.name, more) not in self._evidence:
            self._evidence[variant.name, more] = self._gather(variant, more)
        return self._evidence[variant.name, more]

    def scores(self, variant: Variant, more: int = 0) -> tuple[ImageScore, ...]:
        """What the judge says of each image; held against bf16's."""
        references = _by_pair(self.references(more))
        item = self._items(variant)
        items = [item(image, references[image.prompt, image.seed]) for image in self.images(variant, more)]
        with self._session.reporting("quality judge") as progress:
            # On the CPU scoring would disturb what another process of this session is timing.
            quiet = self._session.machine.torch_device == "cpu"
            with self._session.book.device(progress) if quiet else contextlib.nullcontext():
                return self.judge.score(items)

    def scoring_meanwhile(self, variant: Variant) -> Callable[[DrawnImage], None]:
        """What hands images to the judge while a GPU draws the next ones; `scores` then finds them scored.

        Does nothing where drawing is the CPU's own work, and where the bf16 images would have to be drawn first.
        """
        session = self._session
        if session.machine.torch_device == "cpu":
            return lambda image: None
        itself = variant.name == REFERENCE and not session.injection.quality
        known = {} if itself else self._references_at_hand()
        if known is None:
            return lambda image: None
        item = self._items(variant)
        waiting: list[Item] = []

        def arrived(image: DrawnImage) -> None:
            reference = image if itself else known.get((image.prompt, image.seed))
            if reference is not None:
                waiting.append(item(image, reference))
            if len(waiting) >= _HANDED_IN:
                # Its errors are told when the scores are collected.
                with contextlib.suppress(ZImageError):
                    self.judge.submit(tuple(waiting))
                waiting.clear()

        return arrived

    def _references_at_hand(self) -> dict[tuple[str, int], DrawnImage] | None:
        """The bf16 images of this session or of an earlier one of the same build, without drawing any."""
        session = self._session
        variant = session.catalog.variant(REFERENCE)
        runs = [] if session.injection.quality else session.book.recorded(REFERENCE)
        images = runs[0].images if runs else self._shelf_of(variant, clean=True).find(self._pairs(0))
        return _by_pair(images) if images else None

    def _items(self, variant: Variant) -> Callable[[DrawnImage, DrawnImage], Item]:
        """Makes what the judge is asked of an image of `variant` and its reference."""
        texts = {prompt.name: prompt.text for prompt in self.prompts.prompts}
        size = image_size(self.prompts, self._session.workload)

        def item(image: DrawnImage, reference: DrawnImage) -> Item:
            return Item(
                prompt=image.prompt,
                text=texts[image.prompt],
                seed=image.seed,
                path=image.path,
                pixels_sha256=image.pixels_sha256,
                reference=reference.path,
                reference_sha256=reference.pixels_sha256,
                size=size,
            )

        return item

    @cached_property
    def controls(self) -> tuple[ControlOutcome, ...]:
        """Per prompt, whether CLIPScore tells the prompt's own images from controls that must lose."""
        paths: dict[str, list[str]] = {}
        for image in self.references():
            paths.setdefault(image.prompt, []).append(image.path)
        asked = [ControlPrompt(prompt.name, prompt.text, tuple(paths[prompt.name])) for prompt in self.prompts.prompts]
        return judge_controls(self.judge.controls(asked), load_limits().controls.gap)

    def previews(self, variant: Variant) -> dict[str, bytes]:
        """A small image of every base pair, to be kept beside the baseline."""
        with TemporaryDirectory() as folder:
            return {pair: path.read_bytes() for pair, path in self._make_previews(variant, Path(folder)).items()}

    def to_recorded(self, variant: Variant, recorded: Mapping[str, Path]) -> dict[str, Comparison]:
        """How far each image is from the variant's own recorded one; both as the small previews that are kept."""
        with TemporaryDirectory() as folder:
            made = self._make_previews(variant, Path(folder))
            pairs = [pair for pair in made if pair in recorded]
            compared = self.judge.compare([PathPair(str(made[pair]), str(recorded[pair])) for pair in pairs])
        return dict(zip(pairs, compared, strict=True))

    def _make_previews(self, variant: Variant, folder: Path) -> dict[str, Path]:
        images = self.images(variant)
        jobs = [PreviewJob(i.path, str(folder / f"{i.prompt}-{i.seed}.webp")) for i in images]
        self.judge.preview(jobs)
        return {pair_name(i.prompt, i.seed): Path(job.target) for i, job in zip(images, jobs, strict=True)}

    def _gather(self, variant: Variant, more: int) -> Evidence:
        scored = self.scores(variant, more)
        ready = self.judge.ready()
        names = {(image.prompt, image.seed): pair_name(image.prompt, image.seed) for image in scored}
        record = self._session.run(variant, 0)
        return Evidence(
            prompts=drawn_prompts(self.prompts, self._session.workload),
            pairs=drawn_pairs(self.prompts, more),
            fingerprints={names[image.prompt, image.seed]: image.pixels_sha256 for image in scored},
            scores={
                metric: Scores(
                    scorer=ready.identity(scorer),
                    by_pair={names[image.prompt, image.seed]: _score(image, scorer) for image in scored},
                )
                for metric, scorer in _SCORERS.items()
            },
            unfit={outcome.prompt: outcome.reason for outcome in self.controls if not outcome.fit},
            drawn_on=f"{record.environment.get('device', '')} {record.environment.get('cpu', '')}".strip(),
            previews=self.previews(variant) if self._session.settings.update_baselines else {},
            problems=tuple(problems(scored)),
            injected=bool(self._session.injection),
            environment=record.environment,
        )

    def _pairs(self, more: int) -> tuple[tuple[Prompt, int], ...]:
        return self.prompts.pairs(more)

    def _shelf_of(self, variant: Variant, *, clean: bool = False) -> Shelf:
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


def _by_pair(images: Iterable[DrawnImage]) -> dict[tuple[str, int], DrawnImage]:
    return {(image.prompt, image.seed): image for image in images}


def problems(scored: Sequence[ImageScore]) -> list[str]:
    """What is wrong with images whatever a scorer thinks, and what the scorer did not read."""
    found = [f"{pair_name(i.prompt, i.seed)}: {finding.message}" for i in scored for finding in i.findings]
    lost = {image.prompt: image.tokens_lost for image in scored if image.tokens_lost}
    return found + [f"{prompt}: {count} tokens are beyond the scorer's limit" for prompt, count in lost.items()]


def _score(image: ImageScore, scorer: ScorerName) -> float:
    if scorer == "clip_score":
        value = image.clip_score
    elif image.against is None:
        raise CatalogError(f"{image.path} was scored without a reference", mend="report this as a bug")
    elif scorer == "psnr_db":
        value = float("inf") if image.against.identical else image.against.psnr_db
    else:
        value = image.against.lpips if scorer == "lpips" else image.against.ssim
    if value is None:
        raise CatalogError(f"the judge gave no {scorer}", mend="name a scorer: --zimage-clip, --zimage-lpips")
    return value
