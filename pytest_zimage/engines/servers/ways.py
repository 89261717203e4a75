"""Whether a server is started for a run or runs already: one of the two, and no option that is for the other."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_zimage.errors import UnsupportedError


def check_way(prefix: str, *, starting: Mapping[str, object], url: str | None, pid: int | None) -> None:
    """`prefix` is that of the engine's options; `starting` has those for a server that is started, and their values.

    Raises `UnsupportedError` where options contradict each other, naming them.
    """
    attach = f"{prefix}-url"
    given = [option for option, value in starting.items() if value]
    if url and given:
        names = " and ".join(given)
        raise UnsupportedError(
            f"{names}: for a server that is started here, and {attach} names one that runs already: {url}",
            mend=f"leave out {names}, or {attach}",
        )
    if pid and not url:
        raise UnsupportedError(
            f"{prefix}-pid {pid}: the process of a server that runs already, and nothing says where that one listens",
            mend=f"add {attach}=URL; of a server that is started here the process is known",
        )
