"""What a usage error must look like, whatever it is about."""

from __future__ import annotations

import pytest


def refused(result: pytest.RunResult, *lines: str) -> None:
    """A usage error with these lines, without a traceback and without a warning."""
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(lines)
    shown = result.stdout.str() + result.stderr.str()
    assert "Traceback" not in shown
    assert "Warning" not in shown
