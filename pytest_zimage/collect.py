"""Collection: which variants a suite test is made for, and whether this machine is the one that was asked for."""

from __future__ import annotations

import pytest

from pytest_zimage import lanes
from pytest_zimage.errors import ZImageError
from pytest_zimage.session import start
from pytest_zimage.xdist import refuse_collection

_PARAMETER = "zimage_variant"


def check_settings(config: pytest.Config) -> None:
    """Raise `pytest.UsageError` for options that cannot work, before anything is collected."""
    session = start(config)
    try:
        session.variants()
        session.workload  # noqa: B018
        session.engine  # noqa: B018
    except ZImageError as error:
        raise pytest.UsageError(str(error)) from error


def parametrize(metafunc: pytest.Metafunc) -> None:
    """One test per variant: grouped by it, kept together under `--dist loadgroup`, marked with this machine's lane."""
    if any(_PARAMETER in str(mark.args[:1]) for mark in metafunc.definition.iter_markers("parametrize")):
        return
    try:
        session = start(metafunc.config)
        lane = session.machine.device_class.name
        variants = session.variants()
    except ZImageError as error:
        raise pytest.UsageError(str(error)) from error
    together = metafunc.config.pluginmanager.hasplugin("xdist")
    params = []
    for variant in variants:
        marks = [getattr(pytest.mark, lane)]
        if together:
            marks.append(pytest.mark.xdist_group(variant.name))
        params.append(pytest.param(variant.name, id=variant.name, marks=marks))
    metafunc.parametrize(_PARAMETER, params, indirect=True, scope="session")


def check_lanes(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Stop with a usage error if `-m` asks for the suite on a machine that this is not."""
    session = start(config)
    try:
        lanes.check_expression(config.option.markexpr, session.catalog.devices, session.machine.device_class.name)
    except pytest.UsageError as error:
        refuse_collection(config, items, error)
