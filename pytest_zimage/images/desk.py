"""The image quality of a session: what the judge says of its images, and what becomes evidence for a verdict.

Every variant is held against its reference's images, without a fault in them. Controls are scored on those too, since
they ask whether the scorer is fit, not whether the variant is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pytest_zimage.baselines.quality import Evidence, drawn_pairs, drawn_prompts
from pytest_zimage.catalog import Variant
from pytest_zimage.engines.protocol import DrawnImage
from pytest_zimage.errors import CatalogError
from pytest_zimage.images.early_scoring import scoring_meanwhile
from pytest_zimage.images.gallery import Gallery, by_pair
from pytest_zimage.images.shelf import image_size
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
from pytest_zimage.verdict.paired import Scores, pair_name

if TYPE_CHECKING:
    from pytest_zimage.session import ZImageSession

_SCORERS: dict[str, ScorerName] = {"clip_score": "clip_score", "lpips": "lpips", "psnr": "psnr_db", "ssim": "ssim"}


class QualityDesk:
    """One per pytest process; the images and scores are shared by all processes of a session."""

    def __init__(self, session: ZImageSession) -> None:
        self._session = session
        self.gallery = Gallery(session)
        self._evidence: dict[tuple[str, int], Evidence] = {}
        self._controls: dict[str, tuple[ControlOutcome, ...]] = {}

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

    def evidence(self, variant: Variant, more: int = 0) -> Evidence:
        """Everything the session knows of the variant's images, with `more` further seeds a prompt."""
        if (variant.name, more) not in self._evidence:
            self._evidence[variant.name, more] = self._gather(variant, more)
        return self._evidence[variant.name, more]

    def scores(self, variant: Variant, more: int = 0) -> tuple[ImageScore, ...]:
        """What the judge says of each image, held against its reference's."""
        references = by_pair(self.gallery.references(variant, more))
        images = self.gallery.images(variant, more)
        items = [self.item(image, references[image.prompt, image.seed]) for image in images]
        with self._session.reporting("quality judge") as progress:
            # On the CPU scoring would disturb what another process of this session is timing.
            quiet = self._session.machine.torch_device == "cpu"
            with self._session.book.device(progress) if quiet else contextlib.nullcontext():
                return self.judge.score(items)

    def scoring_meanwhile(self, variant: Variant) -> Callable[[DrawnImage], None]:
        """What hands images of `variant` to the judge as they arrive; `scores` then finds them scored."""
        return scoring_meanwhile(self._session, self, variant)

    def item(self, image: DrawnImage, reference: DrawnImage) -> Item:
        """What a judge is asked of an image and what it is held against, of the same prompt and seed."""
        (text,) = (prompt.text for prompt in self.gallery.prompts.prompts if prompt.name == image.prompt)
        return Item(
            prompt=image.prompt,
            text=text,
            seed=image.seed,
            path=image.path,
            pixels_sha256=image.pixels_sha256,
            reference=reference.path,
            reference_sha256=reference.pixels_sha256,
            size=image_size(self.gallery.prompts, self._session.workload),
        )

    def controls(self, variant: Variant) -> tuple[ControlOutcome, ...]:
        """Per prompt, whether CLIPScore tells the images of `variant`'s reference from controls that must lose."""
        if variant.reference not in self._controls:
            paths: dict[str, list[str]] = {}
            for image in self.gallery.references(variant):
                paths.setdefault(image.prompt, []).append(image.path)
            prompts = self.gallery.prompts.prompts
            asked = [ControlPrompt(prompt.name, prompt.text, tuple(paths[prompt.name])) for prompt in prompts]
            outcomes = judge_controls(self.judge.controls(asked), load_limits().controls.gap)
            self._controls[variant.reference] = outcomes
        return self._controls[variant.reference]

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
        images = self.gallery.images(variant)
        jobs = [PreviewJob(i.path, str(folder / f"{i.prompt}-{i.seed}.webp")) for i in images]
        self.judge.preview(jobs)
        return {pair_name(i.prompt, i.seed): Path(job.target) for i, job in zip(images, jobs, strict=True)}

    def _gather(self, variant: Variant, more: int) -> Evidence:
        scored = self.scores(variant, more)
        ready = self.judge.ready()
        names = {(image.prompt, image.seed): pair_name(image.prompt, image.seed) for image in scored}
        record = self._session.run(variant, 0)
        return Evidence(
            prompts=drawn_prompts(self.gallery.prompts, self._session.workload),
            pairs=drawn_pairs(self.gallery.prompts, more),
            fingerprints={names[image.prompt, image.seed]: image.pixels_sha256 for image in scored},
            scores={
                metric: Scores(
                    scorer=ready.identity(scorer),
                    by_pair={names[image.prompt, image.seed]: _score(image, scorer) for image in scored},
                )
                for metric, scorer in _SCORERS.items()
            },
            unfit={outcome.prompt: outcome.reason for outcome in self.controls(variant) if not outcome.fit},
            drawn_on=f"{record.environment.get('device', '')} {record.environment.get('cpu', '')}".strip(),
            previews=self.previews(variant) if self._session.settings.update_baselines else {},
            problems=tuple(problems(scored)),
            injected=bool(self._session.injection),
            environment=record.environment,
        )


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
