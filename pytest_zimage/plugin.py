"""The pytest hooks. Each delegates; nothing heavy is imported before a test asks for a variant."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pytest_zimage import fixtures, hooks, lanes, options, outcomes
from pytest_zimage.stash import SESSION

if TYPE_CHECKING:
    from pytest_zimage.engines.base import EngineFactory

zimage = fixtures.zimage
zimage_variant = fixtures.zimage_variant
zimage_claim = fixtures.zimage_claim


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hooks)


def pytest_configure(config: pytest.Config) -> None:
    lanes.register_markers(config)
    config.addinivalue_line("markers", "zimage_images: judges images, so each variant's first run draws them too")
    if config.pluginmanager.hasplugin("xdist"):
        from pytest_zimage.xdist import XdistHooks
        from pytest_zimage.xdist_ending import XdistEnding

        config.pluginmanager.register(XdistHooks(config), "zimage-xdist")
        config.pluginmanager.register(XdistEnding(config), "zimage-xdist-ending")
    # A worker of xdist cannot stop the session from here: what is wrong there it tells once it has collected.
    if options.given(config) and not hasattr(config, "workerinput"):
        from pytest_zimage.collect import check_settings

        check_settings(config)


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if not config.option.zimage_list:
        return None
    from pytest_zimage.listing import list_variants

    return list_variants(config)


def pytest_zimage_engines(config: pytest.Config) -> Mapping[str, EngineFactory]:
    from pytest_zimage.engines.offered import offered

    return offered(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "zimage_variant" in metafunc.fixturenames:
        from pytest_zimage.collect import parametrize

        parametrize(metafunc)
    if "zimage_claim" in metafunc.fixturenames:
        from pytest_zimage.collect import parametrize_claims

        parametrize_claims(metafunc)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(outcomes.is_ours(item) for item in items):
        from pytest_zimage.collect import check_collection

        check_collection(config, items)


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(outcomes.is_ours(item) for item in session.items):
        from pytest_zimage.session import start

        ours = start(session.config)
        ours.wants_images = any(item.get_closest_marker("zimage_images") for item in session.items)
        ours.ending.listen()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None and outcomes.is_ours(item):
        from pytest_zimage.closing import note_error

        note_error(item, call.excinfo.value, report)
    return report


def pytest_report_teststatus(report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
    return outcomes.skip_status(report)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    if (ours := session.config.stash.get(SESSION, None)) is not None:
        # Before xdist ends its workers, which takes seconds.
        ours.ending.closing = True
    try:
        yield
    finally:
        if (ours := session.config.stash.get(SESSION, None)) is not None:
            from pytest_zimage.closing import finish

            finish(session, ours)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if (ours := config.stash.get(SESSION, None)) is not None:
        from pytest_zimage.closing import summarise

        summarise(terminalreporter, ours)


def pytest_unconfigure(config: pytest.Config) -> None:
    if (ours := config.stash.get(SESSION, None)) is not None:
        ours.ending.restore()
