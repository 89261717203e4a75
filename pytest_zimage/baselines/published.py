"""Turns a published table into baseline files of provenance `published`.

    python -m pytest_zimage.baselines.published TABLE.json baselines --quality QUALITY.json --recorded-at 2025-01-31

The table is JSON: `title`, `engine`, `hardware`, `stack` and, by variant, `warm_s` {n, mean, std, min, max},
`cold_s`, `rss_peak_gb` and `working_set_gb`. Only what was printed is stored. File sizes were printed in rounded 1e9
bytes, so they are no baseline of the exact `disk_bytes`; memory was printed in GiB. The figures of `--quality`, which
`published_quality` describes, join the files of the same variants.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from pytest_zimage.baselines.published_quality import add_quality, read_quality
from pytest_zimage.baselines.schema import SCHEMA, Baseline, Key, MetricBaseline, Provenance, Published
from pytest_zimage.baselines.tables import read_as
from pytest_zimage.baselines.writing import locked, to_bytes, write_atomically
from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import ZImageError

_GIB = 2**30
_STACK_NAMES = {"comfy_kitchen": "comfy-kitchen", "cuda": "torch_cuda"}
"""The table's name -> the key under which the environment is recorded everywhere else."""


class Row(Struct, frozen=True):
    """One variant of the table."""

    warm_s: Published
    cold_s: float
    rss_peak_gb: float
    working_set_gb: float


class Table(Struct, frozen=True):
    """What is read of the published table; its other fields are prose."""

    title: str
    engine: str
    hardware: str
    stack: dict[str, str]
    variants: dict[str, Row]


def read_table(path: Path) -> Table:
    """Raises `BaselineError` naming file and field."""
    return read_as(path, Table, fields_in="this module's text")


def baselines_of(table: Table, *, device: str, workload: str, recorded_at: str) -> list[Baseline]:
    """One baseline a variant, of the official model set."""
    environment = {_STACK_NAMES.get(name, name): value for name, value in table.stack.items()}
    return [
        Baseline(
            schema=SCHEMA,
            key=Key(device=device, engine=table.engine, model_set="official", workload=workload, variant=name),
            provenance=Provenance(kind="published", source=table.title),
            reason="as published; no measurement of this project's own",
            recorded_at=recorded_at,
            environment={**environment, "hardware": table.hardware},
            metrics={
                "warm_latency": MetricBaseline(unit="s", published=row.warm_s),
                "cold_load": MetricBaseline(unit="s", published=Published(n=1, mean=row.cold_s)),
                "rss_peak": _memory(row.rss_peak_gb),
                "working_set": _memory(row.working_set_gb),
            },
        )
        for name, row in table.variants.items()
    ]


def _memory(gib: float) -> MetricBaseline:
    return MetricBaseline(unit="bytes", published=Published(n=1, mean=float(round(gib * _GIB))))


def write_files(baselines: Iterable[Baseline], folder: Path) -> None:
    """Write each where it belongs below `folder`, replacing what is there, and print where that is."""
    for baseline in baselines:
        path = folder / baseline.key.path()
        with locked(path.parent):
            write_atomically(path, to_bytes(baseline))
        print(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="write published figures as baseline files")
    parser.add_argument("table", type=Path)
    parser.add_argument("baselines", type=Path, help="folder of the stored baselines")
    parser.add_argument("--quality", type=Path, help="table of image scores")
    parser.add_argument("--prompts", default="quality-6x3", help="prompt set of the image scores")
    parser.add_argument("--device", default="gb10")
    parser.add_argument("--workload", default="turbo-1024")
    parser.add_argument("--recorded-at", required=True, metavar="DATE", help="day of the transcription, YYYY-MM-DD")
    options = parser.parse_args(arguments)
    try:
        baselines = baselines_of(
            read_table(options.table),
            device=options.device,
            workload=options.workload,
            recorded_at=options.recorded_at,
        )
        if options.quality is not None:
            baselines = add_quality(baselines, read_quality(options.quality), load_catalog(), options.prompts)
        write_files(baselines, options.baselines)
    except ZImageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
