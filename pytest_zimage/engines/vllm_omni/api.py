"""What vLLM-Omni says of itself: whether it is ready, its version, the model it serves, and what it has drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from pytest_zimage.catalog import Variant
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.http import Http, StatusError
from pytest_zimage.engines.vllm_omni import log, metrics, versions
from pytest_zimage.engines.vllm_omni.versions import Version
from pytest_zimage.errors import EngineError, UnsupportedError

_HEALTH_BYTES = 1 << 16
_START_ONE = "start one to judge its memory, without --zimage-vllm-omni-url"
_PAGE_BYTES = 8 << 20


class _Said(Struct, frozen=True):
    version: str


class Card(Struct, frozen=True):
    id: str
    root: str | None = None


class _Models(Struct, frozen=True):
    data: list[Card]


def is_ready(http: Http) -> bool:
    """A server that loads answers nothing, or 503: a `RequestFault`."""
    http.raw("GET", "/health", _HEALTH_BYTES)
    return True


def metrics_page(http: Http) -> str:
    """What it counts, in Prometheus' text format; an `EngineError` where it serves no such page."""
    return http.raw("GET", "/metrics", _PAGE_BYTES).decode(errors="replace")


def why_used(http: Http) -> str:
    """Why the device memory of one that runs already is not of a run's images alone; empty for one that drew none."""
    try:
        count = metrics.finished(metrics_page(http))
    except RequestFault:
        raise
    except EngineError:
        count = None
    if count == 0:
        return ""
    before = "does not say whether it had drawn" if count is None else "had drawn"
    return f"this vLLM-Omni {before} before this run, and what torch reserved for other images it keeps: {_START_ONE}"


def version_of(http: Http, text: str) -> Version:
    """vLLM-Omni's own version if the log `text` tells it, else vLLM's. Raises `UnsupportedError` as `parse` does."""
    if own := log.own_version(text):
        return versions.parse(own)
    try:
        return versions.parse(http.json("GET", "/version", _Said).version)
    except StatusError as error:
        raise UnsupportedError(f"{error.message}: it is no vLLM-Omni", mend="check the address") from error


def served(http: Http, what: str, is_right: Callable[[Card], bool]) -> str:
    """The name to ask for. Raises `UnsupportedError` if the server has another model."""
    try:
        cards = http.json("GET", "/v1/models", _Models).data
    except StatusError as error:
        raise UnsupportedError(f"{error.message}: it is no vLLM-Omni", mend="check the address") from error
    for card in cards:
        if is_right(card):
            return card.id
    names = ", ".join(repr(card.id[:80]) for card in cards[:5]) or "nothing"
    raise UnsupportedError(
        f"{what} serves {names}, which is not the variant's model",
        mend="choose the variant that it serves, or start it with the variant's repository",
    )


def is_model_of(card: Card, variant: Variant) -> bool:
    """By the hub's name, or by a local folder that is called as the repository or the policy is."""
    names = {variant.repository.rpartition("/")[2], variant.transformer.rstrip("/")} - {""}
    return any(
        said == variant.repository or (said.startswith("/") and Path(said).name in names)
        for said in (card.id, card.root)
        if said
    )
