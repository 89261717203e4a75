"""Image scores of a published table, for the baseline files that `published` writes.

The table is JSON: `title`, `engine`, `hardware`, `seeds`, `prompts_as_printed` (name -> text), `overall` (variant ->
`clip` and `lpips`, each {mean, std}) and `clip_per_prompt_mean_of_3_seeds` (prompt -> variant -> mean). Prompts and
seeds must be those of a prompt set of the catalogue. bf16 has no LPIPS to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct, structs

from pytest_zimage.baselines.merging import environment_override
from pytest_zimage.baselines.quality import drawn_prompts, first_ceiling
from pytest_zimage.baselines.schema import Baseline, BasePrompt, MetricBaseline, Published
from pytest_zimage.baselines.tables import read_as
from pytest_zimage.catalog import Catalog
from pytest_zimage.catalog.model import Metric, PromptSet
from pytest_zimage.errors import BaselineError

_REFERENCE = "bf16"
CLIP_SCORER = "open_clip ViT-B-32"
"""As printed; which weights were in it was not."""
LPIPS_SCORER = "lpips alex"


class MeanStd(Struct, frozen=True):
    mean: float
    std: float


class Overall(Struct, frozen=True):
    """One variant over all images."""

    clip: MeanStd
    lpips: MeanStd | float
    """A plain 0 for the reference itself."""


class QualityTable(Struct, frozen=True):
    """What is read of the published table; its other fields are prose or contained in these."""

    title: str
    engine: str
    hardware: str
    seeds: tuple[int, ...]
    prompts_as_printed: dict[str, str]
    overall: dict[str, Overall]
    clip_per_prompt_mean_of_3_seeds: dict[str, dict[str, float]]


def read_quality(path: Path) -> QualityTable:
    """Raises `BaselineError` naming file and field."""
    return read_as(path, QualityTable, fields_in="the text of published_quality")


def add_quality(
    baselines: Sequence[Baseline], table: QualityTable, catalog: Catalog, prompt_set: str
) -> list[Baseline]:
    """`baselines` with the scores of their variants, those that the table has."""
    prompts = catalog.prompt_set(prompt_set)
    _check(table, prompts)
    unknown = table.overall.keys() - {baseline.key.variant for baseline in baselines}
    if unknown:
        raise BaselineError(f"no baseline to add {', '.join(sorted(unknown))} to", mend="name the table of part 1 too")
    return [
        _with_scores(baseline, table, catalog, drawn_prompts(prompts, catalog.workload(baseline.key.workload)))
        if baseline.key.variant in table.overall and baseline.key.engine == table.engine
        else baseline
        for baseline in baselines
    ]


def _check(table: QualityTable, prompts: PromptSet) -> None:
    """The set of the catalogue must be what was printed, or the figures would be compared with other images."""
    ours = {prompt.name: (prompt.text, prompt.seeds) for prompt in prompts.prompts}
    printed = {name: (text, table.seeds) for name, text in table.prompts_as_printed.items()}
    differing = sorted(name for name in ours.keys() | printed.keys() if ours.get(name) != printed.get(name))
    if differing:
        raise BaselineError(
            f"prompt set {prompts.name} is not what was printed: {', '.join(differing)}", mend="correct prompts.toml"
        )


def _with_scores(baseline: Baseline, table: QualityTable, catalog: Catalog, prompts: dict[str, BasePrompt]) -> Baseline:
    variant = baseline.key.variant
    overall = table.overall[variant]
    by_prompt = {prompt: row[variant] for prompt, row in table.clip_per_prompt_mean_of_3_seeds.items()}
    metrics = {"clip_score": _metric(catalog.metrics["clip_score"], table, overall.clip, CLIP_SCORER, by_prompt)}
    if isinstance(overall.lpips, MeanStd):
        metrics["lpips"] = _metric(catalog.metrics["lpips"], table, overall.lpips, LPIPS_SCORER, {})
    elif variant != _REFERENCE:
        raise BaselineError(f"{variant} has no standard deviation of its LPIPS", mend="only bf16 may be without")
    # The versions that drew these images were not printed.
    environment = environment_override({"hardware": table.hardware}, baseline.environment)
    added = {name: structs.replace(stored, environment=environment) for name, stored in metrics.items()}
    return structs.replace(baseline, metrics={**baseline.metrics, **added}, prompts=prompts)


def _metric(
    metric: Metric, table: QualityTable, printed: MeanStd, scorer: str, by_prompt: dict[str, float]
) -> MetricBaseline:
    return MetricBaseline(
        unit=metric.unit,
        direction=metric.direction,
        scorer=scorer,
        published=Published(
            n=len(table.seeds) * len(table.prompts_as_printed),
            mean=printed.mean,
            std=printed.std,
            by_prompt=by_prompt,
            seeds=table.seeds,
            source=table.title,
        ),
        ceiling=first_ceiling(metric, printed.mean),
    )
