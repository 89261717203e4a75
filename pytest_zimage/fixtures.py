"""What a test may ask for: the `zimage` fixture, one variant ready to be measured and judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_zimage.catalog import Variant
    from pytest_zimage.judging.claims import ClaimCheck
    from pytest_zimage.measuring import ZImage


@pytest.fixture(scope="session")
def zimage_variant(request: pytest.FixtureRequest) -> Variant:
    """The variant under test; session-scoped, so that a variant's tests run together."""
    from pytest_zimage.session import start

    return start(request.config).catalog.variant(request.param)


@pytest.fixture
def zimage(request: pytest.FixtureRequest, zimage_variant: Variant) -> ZImage:
    """One variant: `zimage.gate(zimage.warm_latency())` measures it and judges it against its baseline."""
    from pytest_zimage.measuring import ZImage
    from pytest_zimage.session import start

    return ZImage(request, start(request.config), zimage_variant)


@pytest.fixture
def zimage_claim(request: pytest.FixtureRequest) -> ClaimCheck:
    """One published claim: `zimage_claim.check()` measures it between variants of this session."""
    from pytest_zimage.judging.claims import ClaimCheck
    from pytest_zimage.session import start

    session = start(request.config)
    name, case = request.param
    return ClaimCheck(request, session, session.catalog.claims[name], case)
