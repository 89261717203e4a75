"""Turns the published table of vLLM-Omni's FP8 policies into baseline files of provenance `published`.

    python -m pytest_zimage.baselines.published_fp8 TABLE.json baselines --recorded-at 2025-01-31

The table is JSON: `title`, `engine`, `hardware`, `workload` {width, height, steps, seeds, prompts, timed_runs} and two
passes, `pass_a_SAGE_ATTN` and `pass_b_TORCH_SDPA`, each by policy {mean_latency_s, peak_gpu_gb, psnr_db, ssim}. Pass B
has the plain variants, pass A those whose name ends in `-sage`. Only what was printed is stored: one mean each, without
a spread.

Memory was read from nvidia-smi, which counts in MiB, and printed in GiB as "GB". The policies' differences say so:
`full` makes one byte of two for each of the 6.016e9 weights in 34 blocks, which is 5.60 GiB, and 21.66 - 16.02 = 5.64
were printed; read as 1e9 bytes, none of the larger differences is such a sum of weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from msgspec import Struct, field

from pytest_zimage.baselines.published import write_files
from pytest_zimage.baselines.quality import drawn_prompts
from pytest_zimage.baselines.schema import SCHEMA, Baseline, BasePrompt, Key, MetricBaseline, Provenance, Published
from pytest_zimage.baselines.tables import read_as
from pytest_zimage.catalog import Catalog, load_catalog
from pytest_zimage.catalog.model import PromptSet
from pytest_zimage.catalog.model import Workload as OurWorkload
from pytest_zimage.errors import BaselineError, ZImageError

_GIB = 2**30
_PLAIN = {"bf16_base": "bf16", "online_fp8": "online-fp8"}
"""The table's name -> the variant's; every other one is a policy."""
PSNR_SCORER = "scikit-image psnr"
SSIM_SCORER = "scikit-image ssim win_size=11 channel_axis=-1"
"""As printed; a scorer must have each of these words."""


class Row(Struct, frozen=True):
    """One variant of one pass."""

    mean_latency_s: float
    peak_gpu_gb: float
    psnr_db: float | None
    ssim: float | None


class Printed(Struct, frozen=True):
    """What was drawn."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    timed_runs: int


class Table(Struct, frozen=True):
    """What is read of the published table; its other fields are prose."""

    title: str
    engine: str
    hardware: str
    workload: Printed
    sage: dict[str, Row] = field(name="pass_a_SAGE_ATTN")
    sdpa: dict[str, Row] = field(name="pass_b_TORCH_SDPA")


def read_table(path: Path) -> Table:
    """Raises `BaselineError` naming file and field."""
    return read_as(path, Table, fields_in="this module's text")


def baselines_of(
    table: Table, catalog: Catalog, *, device: str, workload: str, prompts: str, recorded_at: str
) -> list[Baseline]:
    """One baseline a variant, of the official model set.

    Raises `BaselineError` where workload, prompts or variants of the catalogue are not what was printed.
    """
    drawn = _check(table, catalog.workload(workload), catalog.prompt_set(prompts))
    rows = {_variant(name, "-sage"): ("SAGE_ATTN", row) for name, row in table.sage.items()}
    rows |= {_variant(name, ""): ("TORCH_SDPA", row) for name, row in table.sdpa.items()}
    if unknown := sorted(rows.keys() - catalog.variants.keys()):
        raise BaselineError(f"the catalogue has no variant {', '.join(unknown)}", mend="correct variants.toml")
    return [
        Baseline(
            schema=SCHEMA,
            key=Key(device=device, engine=table.engine, model_set="official", workload=workload, variant=name),
            provenance=Provenance(kind="published", source=table.title),
            reason="as published; no measurement of this project's own",
            recorded_at=recorded_at,
            environment={"hardware": table.hardware, "vllm-omni.attention": attention},
            metrics=_metrics(table, row),
            prompts=drawn if row.psnr_db is not None else {},
        )
        for name, (attention, row) in rows.items()
    ]


def _variant(name: str, suffix: str) -> str:
    return _PLAIN.get(name, f"modelopt-{name}") + suffix


def _check(table: Table, workload: OurWorkload, prompts: PromptSet) -> dict[str, BasePrompt]:
    """The prompts of the catalogue, if they and the workload are what was printed."""
    printed = table.workload
    ours = (workload.width, workload.height, workload.steps, workload.guidance)
    theirs = (printed.width, printed.height, printed.steps, printed.guidance_scale)
    if ours != theirs:
        raise BaselineError(f"workload {workload.name} is not what was printed", mend="correct workloads.toml")
    drawn = drawn_prompts(prompts, workload)
    # Each prompt was drawn from the seed at its own place.
    theirs_drawn = list(zip(printed.prompts, ((seed,) for seed in printed.seeds), strict=False))
    if theirs_drawn != [(prompt.text, prompt.seeds) for prompt in drawn.values()]:
        raise BaselineError(f"prompt set {prompts.name} is not what was printed", mend="correct prompts.toml")
    return drawn


def _metrics(table: Table, row: Row) -> dict[str, MetricBaseline]:
    peak = float(round(row.peak_gpu_gb * _GIB))
    metrics = {
        "warm_latency": MetricBaseline(
            unit="s", published=Published(n=table.workload.timed_runs, mean=row.mean_latency_s)
        ),
        "gpu_process_peak": MetricBaseline(unit="bytes", published=Published(n=1, mean=peak)),
    }
    seeds = table.workload.seeds
    if row.psnr_db is not None:
        printed = Published(n=len(seeds), mean=row.psnr_db, seeds=seeds, bare=True)
        metrics["psnr"] = MetricBaseline(unit="dB", direction="higher", scorer=PSNR_SCORER, published=printed)
    if row.ssim is not None:
        printed = Published(n=len(seeds), mean=row.ssim, seeds=seeds, bare=True)
        metrics["ssim"] = MetricBaseline(unit="score", direction="higher", scorer=SSIM_SCORER, published=printed)
    return metrics


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="write the published figures of vLLM-Omni's FP8 policies as baselines")
    parser.add_argument("table", type=Path)
    parser.add_argument("baselines", type=Path, help="folder of the stored baselines")
    parser.add_argument("--prompts", default="vllm-3x1", help="prompt set of the image scores")
    parser.add_argument("--device", default="gb10")
    parser.add_argument("--workload", default="turbo-1024x512")
    parser.add_argument("--recorded-at", required=True, metavar="DATE", help="day of the transcription, YYYY-MM-DD")
    options = parser.parse_args(arguments)
    try:
        write_files(
            baselines_of(
                read_table(options.table),
                load_catalog(),
                device=options.device,
                workload=options.workload,
                prompts=options.prompts,
                recorded_at=options.recorded_at,
            ),
            options.baselines,
        )
    except ZImageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
