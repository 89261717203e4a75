"""What one pytest session owns: the settings, the machine, the model set, the runs, and what was found.

Made on first need, so that a project that merely has the plugin installed pays nothing. Under xdist each worker owns
one; they share the folder of runs, and what they found travels to the controller through `workeroutput`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec import structs

from pytest_zimage.baselines.schema import Key
from pytest_zimage.baselines.store import BaselineStore
from pytest_zimage.catalog import Catalog, Variant, Workload, load_catalog
from pytest_zimage.checkpoints.modelset import Fingerprints, ModelSet, open_model_set
from pytest_zimage.ending import Ending
from pytest_zimage.engines.base import Engine, EngineFactory, ReportProgress, RunPlan
from pytest_zimage.engines.protocol import Injection
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import CatalogError, ZImageError
from pytest_zimage.liveline import open_progress
from pytest_zimage.options import Settings, read_settings, repeated_options
from pytest_zimage.planning import make_plan
from pytest_zimage.probes.device import Machine, detect
from pytest_zimage.probes.environment import MACHINE_ID, memory_total_bytes, session_environment
from pytest_zimage.reports.progress import Progress
from pytest_zimage.runbook import RunBook
from pytest_zimage.stash import FOLDER, SESSION
from pytest_zimage.xdist import given_folder, place_of

if TYPE_CHECKING:
    from pytest_zimage.baselines.update import UpdateResult
    from pytest_zimage.images.desk import QualityDesk
    from pytest_zimage.reports.results import ErrorRow
    from pytest_zimage.verdict.model import Verdict


class ZImageSession:
    """One per pytest process."""

    def __init__(self, config: pytest.Config, settings: Settings, folder: Path) -> None:
        self.config = config
        self.settings = settings
        self.folder = folder
        self.started_at = datetime.now(UTC)
        self.verdicts: list[Verdict] = []
        self.errors: list[ErrorRow] = []
        self.updates: list[UpdateResult] = []
        self.received: list[RunRecord] = []
        """Runs that xdist's workers sent, because they made them in another folder."""
        self.results_path: Path | None = None
        self.notes: tuple[str, ...] = ()
        """What to know of this machine beside every verdict; found when the session ends."""
        self.closing_error: ZImageError | None = None
        self.ending = Ending()
        self.wants_images = False
        """Whether a test of this session judges images: then each variant's first run draws them too."""

    @cached_property
    def catalog(self) -> Catalog:
        """The user's catalogue, plus the class of this machine's device if no table names it."""
        found = self.machine.device_class
        return structs.replace(self._own_catalog, devices={found.name: found, **self._own_catalog.devices})

    @cached_property
    def _own_catalog(self) -> Catalog:
        return load_catalog(self.settings.catalog)

    @cached_property
    def machine(self) -> Machine:
        return detect(
            self._own_catalog,
            os.environ.get("CUDA_VISIBLE_DEVICES"),
            choice=self.settings.device,
            memory_total_bytes=memory_total_bytes(),
            worker=(place.slot, place.workers) if (place := place_of(self.config)) else None,
        )

    @cached_property
    def environment(self) -> dict[str, str]:
        """Machine, system, packages and commit as this process sees them."""
        return session_environment(self.settings.rootdir, self.machine)

    @cached_property
    def model_set(self) -> ModelSet:
        return open_model_set(
            self.settings.models, self.catalog, cache=self.settings.cache, tokenizer=self.settings.tokenizer
        )

    @cached_property
    def workload(self) -> Workload:
        defaults = self.engine.defaults
        default = defaults.tiny_workload if self.model_set.name == "synthetic-tiny" else defaults.workload
        return self.catalog.workload(self.settings.workload or default)

    @cached_property
    def engine(self) -> Engine:
        return self._make_engine(self.settings.engine)

    @cached_property
    def other_engine(self) -> Engine | None:
        """The one that must draw the same pictures; None where none was asked for."""
        name = self.settings.parity
        if name == self.settings.engine:
            raise CatalogError(f"--zimage-parity {name} is the engine itself", mend="name another engine, or none")
        return self._make_engine(name) if name else None

    def _make_engine(self, name: str) -> Engine:
        offered: dict[str, EngineFactory] = {}
        # Later plugins and conftest files come first in pytest's answer, and outrank what is shipped.
        for engines in self.config.hook.pytest_zimage_engines(config=self.config):
            offered = {**engines, **offered}
        if name not in offered:
            raise CatalogError(f"unknown engine {name!r}", mend=f"engines here: {', '.join(sorted(offered))}")
        return offered[name]()

    @cached_property
    def store(self) -> BaselineStore:
        return BaselineStore(
            self.settings.baselines,
            self.settings.local_baselines,
            catalog=self.catalog,
            machine=self.environment[MACHINE_ID],
        )

    @cached_property
    def book(self) -> RunBook:
        device = self.machine.uuid or self.machine.torch_device
        return RunBook(self.runs_folder, self.locks / f"{device.replace(':', '-')}.lock")

    @property
    def runs_folder(self) -> Path:
        """Where the runs of this session lie, those of its xdist workers on this host too."""
        return self.folder / "runs"

    @property
    def locks(self) -> Path:
        """Locks of devices and disks, for all sessions of this host."""
        return self.settings.cache / "locks"

    @cached_property
    def fingerprints(self) -> Fingerprints:
        return Fingerprints()

    @cached_property
    def progress(self) -> Progress:
        return open_progress(self.config)

    @cached_property
    def injection(self) -> Injection:
        amounts = dict(self.settings.inject)
        return Injection(
            warm_latency=float(amounts.get("warm_latency", 0.0)),
            cold_load=float(amounts.get("cold_load", 0.0)),
            memory_bytes=int(amounts.get("memory", 0)),
            quality=str(amounts.get("quality", "")),
            fitness=str(amounts.get("fitness", "")),
            dispatch=str(amounts.get("dispatch", "")),
        )

    @property
    def repeated_options(self) -> list[str]:
        """What a command for the same measurement must say beside the variant."""
        return repeated_options(self.config)

    def variants(self) -> list[Variant]:
        """The variants asked for that this lane can run; raises as `Catalog.select_on` does."""
        asked = self.settings.config or self.engine.defaults.variants
        return self.catalog.select_on(self.machine.device_class.name, asked)

    def key(self, variant: Variant) -> Key:
        return Key(
            device=self.machine.device_class.name,
            engine=self.engine.name,
            model_set=self.model_set.name,
            workload=self.workload.name,
            variant=variant.name,
        )

    def run(self, variant: Variant, index: int) -> RunRecord:
        """Run number `index` of `variant`, measured at most once in the whole session."""

        with self.reporting(variant.name, index) as progress:

            def measure() -> RunRecord:
                plan = self.plan(variant, index, progress)
                if index == 0 and self.wants_images:
                    gallery = self.desk.gallery
                    images = gallery.request(plan, gallery.seeds_at_once)
                    plan = replace(plan, images=images, arrived=self.desk.scoring_meanwhile(variant))
                return self.engine.run(plan, progress)

            return self.book.get(variant.name, index, measure, progress)

    @contextmanager
    def reporting(self, what: str, index: int = 0) -> Iterator[ReportProgress]:
        """Progress of long work on `what`, shown while it lasts."""

        def progress(stage: str, done: int, total: int) -> None:
            self.progress.update(what, index + 1, stage, done, total)

        try:
            yield progress
        finally:
            self.progress.finish()

    @cached_property
    def desk(self) -> QualityDesk:
        """Where images are asked for and judged."""
        from pytest_zimage.images.desk import QualityDesk

        return QualityDesk(self)

    def close(self) -> None:
        """End what this session started."""
        if "desk" in vars(self):
            self.desk.close()
        for name in ("engine", "other_engine"):
            if (engine := vars(self).get(name)) is not None:
                engine.close()

    def plan(self, variant: Variant, index: int, progress: ReportProgress, engine: Engine | None = None) -> RunPlan:
        """What to ask of `engine`, the session's own if None, for run `index`; see `make_plan`."""
        return make_plan(self, engine or self.engine, variant, index, progress)


def start(config: pytest.Config) -> ZImageSession:
    """The session of this process, made now if there is none yet. Raises `pytest.UsageError`."""
    if SESSION not in config.stash:
        settings = read_settings(config)
        config.stash[SESSION] = ZImageSession(config, settings, shared_folder(config))
    return config.stash[SESSION]


def shared_folder(config: pytest.Config) -> Path:
    """The folder of this session, the same for all its xdist workers and their controller."""
    if FOLDER not in config.stash:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        own = config.rootpath / ".zimage" / "sessions" / f"{stamp}-{os.getpid()}"
        config.stash[FOLDER] = given_folder(config) or own
    return config.stash[FOLDER]
