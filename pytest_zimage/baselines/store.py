"""Finding, reading and rewriting baselines in their three layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from pytest_zimage.baselines.images import previews_folder, prune_previews, put_previews
from pytest_zimage.baselines.layers import IMAGES, Layer, layer_key, layer_of, layer_of_images
from pytest_zimage.baselines.reading import NewerSchemaError, read_baseline
from pytest_zimage.baselines.schema import BaseImages, Baseline, Key, MetricBaseline, Published
from pytest_zimage.baselines.writing import locked, to_bytes, write_atomically
from pytest_zimage.catalog import Catalog
from pytest_zimage.errors import BaselineError
from pytest_zimage.probes.environment import MACHINE_ID

_RECORD = '--zimage-config {} --update-baselines --update-mode new --update-reason "first of this variant"'


class Found(Struct, frozen=True, kw_only=True):
    """A stored baseline of one metric."""

    metric: MetricBaseline
    baseline: Baseline
    path: Path
    layer: Layer


class FoundImages(Struct, frozen=True, kw_only=True):
    """The fingerprints and previews of one variant."""

    images: BaseImages
    path: Path
    """The baseline file."""

    def preview(self, pair: str) -> Path | None:
        """The stored preview of `prompt/seed`; None where none was kept, or its file is gone."""
        name = self.images.previews.get(pair)
        file = previews_folder(self.path) / name if name else None
        return file if file is not None and file.is_file() else None


class Absent(Struct, frozen=True, kw_only=True):
    """NO BASELINE: nothing of this kind has been recorded yet. Not an error."""

    reason: str


class Reference(Struct, frozen=True, kw_only=True):
    """A published figure, to be shown beside a verdict that has no baseline of its own."""

    published: Published
    unit: str
    engine: str
    model_set: str
    source: str


class Neighbours(Struct, frozen=True, kw_only=True):
    """What the other variants of a folder have recorded for one metric."""

    metrics: tuple[MetricBaseline, ...] = ()
    notes: tuple[str, ...] = ()
    """Files that could not be read; their own variants' tests fail."""


class BaselineStore:
    """`baselines` holds the portable and device layers, `local` that of this machine, known by its fingerprint."""

    def __init__(self, baselines: Path, local: Path, *, catalog: Catalog, machine: str) -> None:
        self._baselines = baselines
        self._local = local
        self._catalog = catalog
        self._machine = machine

    def find(self, key: Key, metric: str) -> Found | Absent:
        """The baseline of `metric`, or why there is none yet.

        Raises `BaselineError` for a file that cannot be trusted, and where the folder of `key` holds baselines but none
        of this variant or metric: that is a gap, not a beginning. A metric that is not `required` leaves no gap, nor
        does what a published table never printed.
        """
        layer, path = self.locate(key, metric)
        stored_key = layer_key(key, layer)
        if not any(path.parent.glob("*.json")):
            return Absent(reason=f"no baselines in {path.parent}")
        if not path.is_file():
            if self._only_published(path.parent, stored_key):
                return Absent(reason=f"the published table has no {key.variant} ({path.parent})")
            raise BaselineError(
                f"{path}: is missing, though the folder holds baselines of other variants",
                mend=f"record it: {_RECORD.format(key.variant)}",
            )
        baseline = read_baseline(path, stored_key, self._catalog.metrics)
        if layer == "machine" and not self.is_ours(baseline):
            theirs = baseline.environment.get(MACHINE_ID, "an unnamed machine")
            return Absent(reason=f"{path} was recorded on another machine ({theirs}; this is {self._machine})")
        if metric not in baseline.metrics:
            if baseline.provenance.kind == "published":
                return Absent(reason=f"the published table has no {metric} for {key.variant} ({path})")
            if not self._catalog.metrics[metric].required:
                return Absent(reason=f"{path} has no {metric}, which is judged only where it was recorded")
            raise BaselineError(
                f"{path}: has no metric {metric!r}; it has {', '.join(sorted(baseline.metrics))}",
                mend=f"record it: {_RECORD.format(key.variant)}",
            )
        return Found(metric=baseline.metrics[metric], baseline=baseline, path=path, layer=layer)

    def images(self, key: Key) -> FoundImages | None:
        """The recorded images of `key`'s variant, if any. Raises `BaselineError` for a file that cannot be trusted."""
        layer, path = self.locate(key, IMAGES)
        if not path.is_file():
            return None
        found = read_baseline(path, layer_key(key, layer), self._catalog.metrics).images
        return FoundImages(images=found, path=path) if found is not None else None

    def neighbours(self, key: Key, metric: str) -> Neighbours:
        """The same metric of the other variants, for the noise they show."""
        layer, path = self.locate(key, metric)
        metrics, notes = [], []
        for other in sorted(path.parent.glob("*.json")):
            if other == path:
                continue
            other_key = structs.replace(layer_key(key, layer), variant=other.stem)
            try:
                baseline = read_baseline(other, other_key, self._catalog.metrics)
            except BaselineError as error:
                notes.append(f"its noise is left out: {error.message}")
                continue
            if metric in baseline.metrics and (layer != "machine" or self.is_ours(baseline)):
                metrics.append(baseline.metrics[metric])
        return Neighbours(metrics=tuple(metrics), notes=tuple(notes))

    def published_reference(self, key: Key, metric: str) -> Reference | None:
        """The published figure of any engine and model set for this device class, workload, variant and metric."""
        for path, other in self._published(key):
            # A shown figure only: a file that is broken fails the tests that are judged by it.
            with suppress(BaselineError):
                stored = read_baseline(path, other, self._catalog.metrics)
                found = stored.metrics.get(metric)
                if found is not None and found.published is not None:
                    return Reference(
                        published=found.published,
                        unit=found.unit,
                        engine=other.engine,
                        model_set=other.model_set,
                        source=found.published.source or stored.provenance.source,
                    )
        return None

    def recorded(self, variant: str) -> Iterator[Baseline]:
        """Every baseline of `variant`: of any device class, engine, model set and workload, and of this machine's own.

        One that is broken is left out, because it fails the tests that are judged by it.
        """
        for root in (self._baselines, self._local):
            for path, key in _claimed(root, f"*/*/{variant}.json"):
                with suppress(BaselineError):
                    yield read_baseline(path, key, self._catalog.metrics)

    def rewrite(
        self,
        key: Key,
        layer: Layer,
        merge: Callable[[Baseline | None], Baseline | None],
        *,
        replace_unreadable: bool = False,
        previews: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Replace the file of `key` by what `merge` makes of its present content, while no other session may.

        `merge` gets None where there is no file or one of another machine; what it returns is written, None leaves the
        file alone. With `replace_unreadable` a broken file counts as none and is kept beside as `NAME.unreadable`; one
        of a newer schema is never replaced. `previews`, by file name, are kept as far as what is written names them.
        Raises `BaselineError`; the old file is then as it was.
        """
        path = self.root(layer) / layer_key(key, layer).path()
        with locked(path.parent):
            current = None
            if path.exists():
                try:
                    current = read_baseline(path, layer_key(key, layer), self._catalog.metrics)
                except NewerSchemaError:
                    raise
                except BaselineError:
                    if not replace_unreadable:
                        raise
                    write_atomically(path.with_name(path.name + ".unreadable"), path.read_bytes())
            if current is not None and layer == "machine" and not self.is_ours(current):
                current = None
            merged = merge(current)
            if merged is not None:
                put_previews(path, merged.images, previews or {}, path.parent.parent)
                write_atomically(path, to_bytes(self._stamped(merged, layer)))
                prune_previews(path, merged.images)
        return path

    def root(self, layer: Layer) -> Path:
        return self._local if layer == "machine" else self._baselines

    def locate(self, key: Key, metric: str) -> tuple[Layer, Path]:
        """Layer and file of `metric`, or of the recorded `images`.

        Raises `BaselineError` for a metric that the catalogue does not have.
        """
        device = self._catalog.device(key.device)
        if metric == IMAGES:
            layer = layer_of_images(device)
            return layer, self.root(layer) / layer_key(key, layer).path()
        if metric not in self._catalog.metrics:
            raise BaselineError(f"unknown metric {metric!r}", mend=f"known: {', '.join(self._catalog.metrics)}")
        layer = layer_of(self._catalog.metrics[metric], device)
        return layer, self.root(layer) / layer_key(key, layer).path()

    def is_ours(self, baseline: Baseline) -> bool:
        """Whether this machine recorded it."""
        return baseline.environment.get(MACHINE_ID) == self._machine

    def _only_published(self, folder: Path, key: Key) -> bool:
        """Whether every baseline of `folder` can be read and was printed, not measured."""
        for path in folder.glob("*.json"):
            try:
                stored = read_baseline(path, structs.replace(key, variant=path.stem), self._catalog.metrics)
            except BaselineError:
                return False
            if stored.provenance.kind != "published":
                return False
        return True

    def _stamped(self, baseline: Baseline, layer: Layer) -> Baseline:
        if layer != "machine":
            return baseline
        return structs.replace(baseline, environment={**baseline.environment, MACHINE_ID: self._machine})

    def _published(self, key: Key) -> Iterator[tuple[Path, Key]]:
        """Files of this device class, workload and variant, with the key that each claims and lies under."""
        for path, claimed in _claimed(self._baselines, f"{key.device}/*-{key.workload}/{key.variant}.json"):
            if claimed.workload == key.workload:
                yield path, claimed


def _claimed(root: Path, pattern: str) -> Iterator[tuple[Path, Key]]:
    """Files below `root` that lie where the key that they claim belongs."""
    for path in sorted(root.glob(pattern)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            claimed = msgspec.convert(json.loads(path.read_bytes())["key"], Key)
            if root / claimed.path() == path:
                yield path, claimed
