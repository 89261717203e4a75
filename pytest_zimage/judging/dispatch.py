"""The dispatch map's part in a verdict: a check that needs no baseline, and what it explains of a change in time."""

from __future__ import annotations

from pytest_zimage.baselines.store import Found
from pytest_zimage.catalog import Variant
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import BaselineError, MeasurementError
from pytest_zimage.judging.twins import judge_by_twin
from pytest_zimage.session import ZImageSession
from pytest_zimage.verdict.model import Verdict
from pytest_zimage.verdict.moves import moves
from pytest_zimage.verdict.rows import QUANTISED, limit_row

DISPATCH = "dispatch"
_DECLARED = "quantised-activations"
_PRODUCTS = ("scaled_mm", "int8_linear", "int_mm")
_LAYERS_SHOWN = 8


def judge_quantised(session: ZImageSession, test: str, variant: Variant) -> Verdict:
    """Whether every layer that says it computes with quantised activations did, throughout the traced image.

    Where the engine does not trace, the images of the variant's twin tell. Raises `MeasurementError` where what there
    is cannot tell.
    """
    record = session.run(variant, 0)
    if record.dispatch is None and variant.twin:
        return judge_by_twin(session, test, variant, QUANTISED)
    declared = record.loaded.compute.get(_DECLARED, 0)
    calls = _dequantised_calls(record, declared)
    if calls:
        notes = _layers(record)
    elif not declared:
        notes = ["no layer of this variant computes with quantised activations on this device"]
    else:
        notes = []
    return limit_row(
        test,
        variant,
        QUANTISED,
        unit="count",
        broken="DEQUANTISED" if calls else "",
        value=float(calls or declared),
        k_new=1,
        notes=tuple(notes),
        injected=bool(session.injection),
    )


def dispatch_moves(session: ZImageSession, variant: Variant) -> tuple[str, ...] | None:
    """What is served otherwise than in the baseline's map; None where one of the sides has no map."""
    try:
        found = session.store.find(session.key(variant), DISPATCH)
    except BaselineError:
        return None
    now = session.run(variant, 0).dispatch
    if not now or not isinstance(found, Found) or not isinstance(found.metric.exact, dict):
        return None
    return moves(found.metric.exact, now)


def _dequantised_calls(record: RunRecord, declared: int) -> int:
    """Calls of the traced image that dequantised where the layer computes quantised."""
    calls = record.dispatch or {}
    linears = {key.removeprefix("linear: "): number for key, number in calls.items() if key.startswith("linear: ")}
    if not linears:
        raise _blind(record, "the trace saw no linear at all")
    dequantised = linears.get("dequantised", 0) + sum(
        number for key, number in calls.items() if key.endswith(": dequantised") and not key.startswith("linear: ")
    )
    if dequantised or not declared:
        return linears.get("dequantised", 0) or dequantised
    if "compiled" in linears:
        products = sum(number for key, number in calls.items() if key.startswith(_PRODUCTS))
        if products < declared:
            raise _blind(record, f"{declared} layers compute quantised and compiled graphs made {products} products")
    elif unseen := linears.get("not observed", 0):
        raise _blind(record, f"the trace could not tell how {unseen} of its linears computed")
    elif linears.get(_DECLARED, 0) < declared:
        seen = linears.get(_DECLARED, 0)
        raise _blind(record, f"{declared} layers compute quantised and {seen} such calls were seen")
    return 0


def _layers(record: RunRecord) -> list[str]:
    shown = [f"{name}: {calls} calls" for name, calls in list(record.dequantised.items())[:_LAYERS_SHOWN]]
    more = len(record.dequantised) - len(shown)
    calls = record.dispatch or {}
    served = [f"{key}, {number} calls" for key, number in calls.items() if key.endswith(": dequantised")]
    return [*served, *shown, *([f"and {more} more layers"] if more else [])]


def _blind(record: RunRecord, why: str) -> MeasurementError:
    return MeasurementError(
        f"{record.variant}: {why}, so nothing shows that no layer dequantised",
        mend="trace again; an engine of your own must fill RunRecord.dispatch with how each linear computed",
    )
