"""Options that are for one engine: which of them count, and that none is given in vain."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pytest_zimage.options.table import OPTIONS, Option

_SHIPPED = {"diffusers", *(row.engine for row in OPTIONS if row.engine)}


def told(config: pytest.Config, row: Option) -> bool:
    """Whether it stands on the command line."""
    return config.getoption(row.dest, None) is not None


def outranked(config: pytest.Config) -> set[str]:
    """Ini values that are for a server that runs already where the command line has one started, or the reverse."""
    given = {(row.engine, row.way) for row in OPTIONS if row.way and told(config, row)}
    return {
        row.dest
        for row in OPTIONS
        if row.way and (row.engine, row.way) not in given and any(engine == row.engine for engine, _ in given)
    }


def refuse_unnamed_weights(config: pytest.Config, drawing: set[str], values: Mapping[str, object]) -> None:
    """Raises `pytest.UsageError` for a server that runs already: nobody but its owner knows which weights it has."""
    for row in OPTIONS:
        draws = row.engine in drawing or (told(config, row) and not drawing <= _SHIPPED)
        if row.way == "attach" and row.name.endswith("_url") and values[row.dest] and draws:
            raise pytest.UsageError(
                f"{row.option} names a server that runs already, and nothing says which weights it has: add"
                " --zimage-models=official, or --zimage-models=DIR where the folder that it reads is on this host"
            )


def refuse_others(config: pytest.Config, drawing: set[str]) -> None:
    """Raises `pytest.UsageError` for an option of an engine that draws nothing; another's own may build on any."""
    drawn = " and ".join(sorted(drawing))
    for row in OPTIONS:
        if row.engine and told(config, row) and drawing <= _SHIPPED - {row.engine}:
            raise pytest.UsageError(
                f"{row.option} is for the engine {row.engine}, and this session draws with {drawn}:"
                f" add --zimage-engine={row.engine}, or leave it out"
            )
