"""Collection: which variants a suite test is made for, and whether this machine is the one that was asked for."""

from __future__ import annotations

import pytest

from pytest_zimage import lanes
from pytest_zimage.errors import ZImageError
from pytest_zimage.groups import group_of
from pytest_zimage.options.table import OPTIONS
from pytest_zimage.session import start
from pytest_zimage.xdist import refuse_collection

_PARAMETER = "zimage_variant"
_CLAIM = "zimage_claim"


def check_settings(config: pytest.Config) -> None:
    """Raise `pytest.UsageError` for options, ini values or a model folder that cannot work."""
    _refuse_folder_taken_for_tests(config)
    session = start(config)
    try:
        variants = session.variants()
        session.workload  # noqa: B018
        for engine in filter(None, (session.engine, session.other_engine)):
            engine.refuse_choice(variants)
    except ZImageError as error:
        raise pytest.UsageError(str(error)) from error


def parametrize(metafunc: pytest.Metafunc) -> None:
    """One test per variant: grouped by it, kept together under `--dist loadgroup`, marked with this machine's lane."""
    if any(_PARAMETER in str(mark.args[:1]) for mark in metafunc.definition.iter_markers("parametrize")):
        return
    try:
        check_settings(metafunc.config)
    except pytest.UsageError:
        # Raised here it would read as a traceback of the test file; `check_collection` stops with it.
        metafunc.parametrize(_PARAMETER, ["?"], indirect=True, scope="session")
        return
    session = start(metafunc.config)
    lane = _lane(metafunc.config)
    together = metafunc.config.pluginmanager.hasplugin("xdist")
    images = metafunc.definition.get_closest_marker("zimage_images") is not None
    params = []
    for variant in session.variants():
        marks = [getattr(pytest.mark, lane)]
        if together:
            marks.append(pytest.mark.xdist_group(group_of(variant.name, images=images)))
        params.append(pytest.param(variant.name, id=variant.name, marks=marks))
    metafunc.parametrize(_PARAMETER, params, indirect=True, scope="session")


def parametrize_claims(metafunc: pytest.Metafunc) -> None:
    """One test per claim and variant, marked with the lane that it was made on and with this machine's.

    Each is a group of its own for xdist, which hands out small groups last: by then the variants' runs are there.
    """
    try:
        check_settings(metafunc.config)
    except pytest.UsageError:
        metafunc.parametrize(_CLAIM, [("?", 0)], ids=["?"], indirect=True)
        return
    session = start(metafunc.config)
    here = _lane(metafunc.config)
    params = []
    for claim in session.catalog.claims.values():
        marks = [getattr(pytest.mark, lane) for lane in dict.fromkeys((here, claim.lane))]
        for case, names in enumerate(claim.cases()):
            name = claim.name if claim.kind == "order" else f"{claim.name}-{names[0]}"
            params.append(pytest.param((claim.name, case), id=name, marks=marks))
    metafunc.parametrize(_CLAIM, params, indirect=True)


def _lane(config: pytest.Config) -> str:
    machine = start(config).machine
    lane = machine.device_class.name
    if not any(line.partition(":")[0] == lane for line in config.getini("markers")):
        # A device that no table of an ini value names is a lane all the same, and --strict-markers must know it.
        config.addinivalue_line("markers", f"{lane}: zimage lane: runs on {machine.name}")
    return lane


def check_collection(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Stop with a usage error if the suite cannot work as asked, or `-m` asks for it on a machine that this is not.

    Claims come last: they are about runs that the tests of the variants make.
    """
    items.sort(key=lambda item: _CLAIM in getattr(item, "fixturenames", ()))
    try:
        check_settings(config)
        session = start(config)
        lanes.check_expression(config.option.markexpr, session.catalog.devices, session.machine.device_class.name)
    except pytest.UsageError as error:
        refuse_collection(config, items, error)


def _refuse_folder_taken_for_tests(config: pytest.Config) -> None:
    """pytest looks for its ini file before it knows our options, and takes a folder after a space for one of tests.

    Where that led it away from here, ini values would be lost and results land in a stranger's folder.
    """
    told_where = config.getoption("inifilename", None) or config.getoption("rootdir", None)
    if told_where or config.args_source is pytest.Config.ArgsSource.ARGS:
        return
    here = config.invocation_params.dir
    if config.rootpath == here if config.inipath is None else here.is_relative_to(config.inipath.parent):
        return
    for row in OPTIONS:
        value = config.getoption(row.dest, None)
        for text in value if isinstance(value, list) else [value]:
            if text in config.invocation_params.args and (here / text).exists():
                raise pytest.UsageError(
                    f"pytest took {text} for a folder of tests and looked for its ini file there:"
                    f" write {row.option}={text}"
                )
