"""The catalogue as it was read: rows by name, and how a person names some of them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from typing import TypeVar

from msgspec import Struct

from pytest_zimage.catalog.claims import Claim
from pytest_zimage.catalog.device_class import DeviceClass
from pytest_zimage.catalog.model import Metric, ModelDims, ModelFile, PromptSet, Variant, Workload
from pytest_zimage.errors import CatalogError

Row = TypeVar("Row", bound=Struct)
_SHOWN = "--zimage-list shows them all"


class Catalog(Struct, frozen=True):
    """Everything the TOML files define, by name, in file order."""

    variants: dict[str, Variant]
    files: dict[str, ModelFile]
    workloads: dict[str, Workload]
    prompts: dict[str, PromptSet]
    devices: dict[str, DeviceClass]
    metrics: dict[str, Metric]
    models: dict[str, ModelDims]
    claims: dict[str, Claim]

    def variant(self, name: str) -> Variant:
        return _pick(self.variants, name, "variant", _SHOWN)

    def workload(self, name: str) -> Workload:
        return _pick(self.workloads, name, "workload", "name one of the catalogue, or add a table of your own")

    def prompt_set(self, name: str) -> PromptSet:
        return _pick(self.prompts, name, "prompt set", "name one of the catalogue, or add a table of your own")

    def device(self, name: str) -> DeviceClass:
        return _pick(self.devices, name, "device class", "name one of the catalogue, or add a table of your own")

    def select(self, patterns: Iterable[str]) -> list[Variant]:
        """Variants in catalogue order that any of `patterns` names: name, glob, `@tag`; with `!` before it: not that.

        Without patterns that name any: the default ones, which is what runs when nobody says what to run.

        Raises `CatalogError` for a pattern that names nothing, and if nothing is left.
        """
        given = list(patterns)
        out = [pattern[1:] for pattern in given if pattern.startswith("!")]
        wanted = [pattern for pattern in given if not pattern.startswith("!")]
        unwanted = {name for pattern in out for name in self._named(pattern)}
        chosen = {name for pattern in wanted for name in self._named(pattern)}
        chosen = chosen or {variant.name for variant in self.variants.values() if variant.default}
        left = [variant for variant in self.variants.values() if variant.name in chosen - unwanted]
        if chosen and not left:
            raise CatalogError(
                f"{', '.join('!' + pattern for pattern in out)} leaves out every variant that was asked for",
                mend="ask for more, or leave out less",
            )
        return left

    def select_on(self, lane: str, patterns: Iterable[str]) -> list[Variant]:
        """Those that `select` finds and that run on the device class `lane`.

        Raises `CatalogError` as that does, if there is none, and for one that is named whole and does not run there.
        """
        given = list(patterns)
        chosen = self.select(given)
        able = [variant for variant in chosen if variant.runs_on(lane)]
        if not able:
            names = ", ".join(variant.name for variant in chosen)
            raise CatalogError(f"none of {names} runs on {lane}", mend="see the lanes of each in --zimage-list")
        for variant in chosen:
            if variant.name in given and not variant.runs_on(lane):
                raise CatalogError(
                    f"{variant.name} does not run on {lane}: its lanes are {', '.join(variant.lanes)}",
                    mend="a pattern or a tag leaves out what does not run here, and a note says so; a name does not",
                )
        return able

    def _named(self, pattern: str) -> list[str]:
        if not pattern.startswith("@"):
            if hits := fnmatch.filter(self.variants, pattern):
                return hits
            if any(sign in pattern for sign in "*?["):
                raise CatalogError(f"no variant matches {pattern!r}", mend=_SHOWN)
            return [self.variant(pattern).name]  # raises, and says which name may be meant
        if hits := [variant.name for variant in self.variants.values() if pattern[1:] in variant.tags]:
            return hits
        tags = sorted({tag for variant in self.variants.values() for tag in variant.tags})
        raise CatalogError(f"no variant has the tag {pattern}", mend=f"known tags: {', '.join(tags)}")


def _pick(rows: dict[str, Row], name: str, what: str, mend: str) -> Row:
    if name in rows:
        return rows[name]
    raise CatalogError(f"unknown {what} {name!r}" + did_you_mean(name, rows), mend=mend)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'nvfp4'?` for a name like one of `known`; empty where none is."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
