"""Whether a variant multiplies quantised, told by images where no trace tells: they must differ from its twin's.

The twin holds the same weights and multiplies them unquantised. An engine that quietly takes the same way for both
draws the same images from the same seeds, to the last bit, and everything else about the variant looks sound.
"""

from __future__ import annotations

from collections.abc import Mapping

from pytest_zimage.catalog import Variant
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import MeasurementError
from pytest_zimage.probes.environment import other_weights
from pytest_zimage.session import ZImageSession
from pytest_zimage.verdict.model import Verdict
from pytest_zimage.verdict.rows import limit_row

_MAY_DIFFER = frozenset(("name", "title", "weight_dtype", "reference", "twin", "default", "tags", "lanes"))
"""Fields of a variant that a twin may have otherwise; any other one would change images by itself."""


def judge_by_twin(session: ZImageSession, test: str, variant: Variant, metric: str) -> Verdict:
    """Whether the rounds of `variant`'s first run show other images than those of its twin's, seed by seed.

    Raises `MeasurementError` where the two cannot be compared: other weights, no seed that both drew, or an engine
    that does not draw the same image twice.
    """
    twin = session.catalog.variant(variant.twin)
    _refuse_strangers(variant, twin)
    ours, theirs = session.run(variant, 0), session.run(twin, 0)
    _refuse_other_work(ours, theirs)
    mine, other = _by_seed(ours), _by_seed(theirs)
    common = [seed for seed in mine if seed in other]
    if not common:
        raise MeasurementError(
            f"{variant.name} and its twin {twin.name} drew no round from the same seed, so their images cannot tell"
            " whether it multiplies quantised",
            mend="measure both in one session with as many rounds; an engine tells the seeds of all rounds or of none",
        )
    equal = sum(mine[seed] == other[seed] for seed in common)
    same = equal == len(common)
    if same:
        told = f"{_counted(equal)} to the last bit that of the twin {twin.name}, which multiplies unquantised"
    else:
        told = f"images differ from those of its twin {twin.name}: {len(common) - equal} of {len(common)}"
    return limit_row(
        test,
        variant,
        metric,
        unit="count",
        broken="NOT QUANTISED" if same else "",
        value=float(equal),
        k_new=1,
        notes=(told, *(ours.unquantised if same else ()), *emulation(ours)),
        injected=bool(session.injection),
    )


def emulation(record: RunRecord) -> tuple[str, ...]:
    """What the engine says it computes by dequantising on this machine, as a note."""
    if not record.emulated:
        return ()
    return (f"{record.engine} says that it emulates {', '.join(record.emulated)} on {record.device}, by dequantising",)


def _refuse_strangers(variant: Variant, twin: Variant) -> None:
    fields = [name for name in Variant.__struct_fields__ if name not in _MAY_DIFFER]
    others = [name for name in fields if getattr(variant, name) != getattr(twin, name)]
    if others:
        raise MeasurementError(
            f"{twin.name} is no twin of {variant.name}: they differ in {', '.join(others)}, which changes images too",
            mend=f"correct the key 'twin' of [variants.{variant.name}]",
        )


def _refuse_other_work(ours: RunRecord, theirs: RunRecord) -> None:
    for what in ("engine", "model_set", "workload", "device"):
        if getattr(ours, what) != getattr(theirs, what):
            raise _incomparable(ours, theirs, what, getattr(ours, what), getattr(theirs, what))
    for key, (here, there) in other_weights(ours.environment, theirs.environment).items():
        raise _incomparable(ours, theirs, key, here, there)


def _incomparable(ours: RunRecord, theirs: RunRecord, what: str, here: str, there: str) -> MeasurementError:
    return MeasurementError(
        f"{ours.variant} and its twin {theirs.variant} were not drawn from the same {what}: {here} and {there}",
        mend="measure both in one session, with one set of weights",
    )


def _by_seed(record: RunRecord) -> Mapping[int | None, str]:
    """The fingerprint of each round by its seed; None stands for the workload's, which both runs share."""
    found: dict[int | None, str] = {}
    for round_ in record.rounds:
        if found.setdefault(round_.seed, round_.pixels_sha256) != round_.pixels_sha256:
            seed = "the workload's seed" if round_.seed is None else f"seed {round_.seed}"
            raise MeasurementError(
                f"{record.variant}: {record.engine} drew two images from {seed}, so a difference from a twin's image"
                " shows nothing",
                mend="have the engine draw deterministically",
            )
    return found


def _counted(images: int) -> str:
    return "the one image that both drew is" if images == 1 else f"each of {images} images is"
