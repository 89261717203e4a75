"""What is asked of an engine for one run: as much of files, tokenizer and environment as is of use to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_zimage.catalog import Role, Variant
from pytest_zimage.checkpoints.modelset import ModelSet
from pytest_zimage.engines.base import Engine, ReportProgress, RunPlan
from pytest_zimage.errors import MissingFileError, ZImageError
from pytest_zimage.judging.fitness import fit_plan
from pytest_zimage.locks import disks
from pytest_zimage.probes.packages import without_packages
from pytest_zimage.xdist import place_of

if TYPE_CHECKING:
    from pytest_zimage.session import ZImageSession

_TURN_S = 0.2


def make_plan(
    session: ZImageSession, engine: Engine, variant: Variant, index: int, progress: ReportProgress
) -> RunPlan:
    """The plan of run `index`, without images. Synthetic files that it needs are written first if they are not there.

    Raises a `ZImageError` for files that will not do.
    """
    model_set = session.model_set
    if engine.needs_files:
        anew = model_set.ensure(
            variant.files().values(),
            device=session.machine.torch_device,
            say=lambda line: progress(f"writing {model_set.name}: {line}", 0, 0),
        )
        session.notes = (*session.notes, *anew)
    files = _files(model_set, variant, engine)
    return RunPlan(
        variant=variant,
        workload=session.workload,
        model_set=model_set.name,
        dims=model_set.dims,
        files=files,
        tokenizer=_tokenizer(model_set, engine),
        device="cuda:0" if session.machine.uuid else session.machine.torch_device,
        gpu=session.machine.uuid,
        index=index,
        rounds=session.settings.rounds,
        inject=session.injection,
        images=None,
        environment={
            **environment_of(session, engine),
            **{f"weights.{role}": session.fingerprints(path) for role, path in files.items()},
        },
        log=session.folder / "logs" / f"{variant.name}-{index + 1}.log",
        timeout_s=session.settings.timeout_s,
        fit=fit_plan(session, variant),
        replays_forwards=session.machine.device_class.replays_forwards,
        disks=lambda files, progress: disks(session.locks, files, progress, after_s=turn_s(session)),
    )


def turn_s(session: ZImageSession) -> float:
    """How long to let others ask for the disk first, in seconds.

    All of xdist's workers ask at once when a session begins, and those with the most to load have the higher slots.
    Nothing is lost by it: the packages that a load needs are imported meanwhile.
    """
    place = place_of(session.config)
    return _TURN_S * place.slot if place is not None and session.book.is_empty else 0.0


def environment_of(session: ZImageSession, engine: Engine) -> dict[str, str]:
    """What this process knows of what `engine` draws on, and with."""
    return dict(session.environment) if engine.draws_here else without_packages(session.environment)


def _files(model_set: ModelSet, variant: Variant, engine: Engine) -> dict[Role, Path]:
    """An engine that reads weights of its own keeping is given these where all are here, and else none."""
    try:
        return model_set.files(variant)
    except ZImageError:
        if engine.needs_files:
            raise
        return {}


def _tokenizer(model_set: ModelSet, engine: Engine) -> Path | None:
    """An engine that brings its own is given what lies beside the files that it reads, if anything does."""
    if not engine.needs_files:
        return None
    try:
        return model_set.find_tokenizer()
    except MissingFileError:
        if engine.needs_tokenizer:
            raise
        return None
