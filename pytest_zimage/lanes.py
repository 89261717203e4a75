"""Lane markers: `-m gb10` means "this suite, on a GB10", and must not turn green by skipping everything elsewhere.

A suite test carries the marker of the lane it is about to run on, so pytest's own `-m` selects. What pytest cannot know
is that an expression which selects nothing here asks for another machine; that is a usage error, decided on the
expression alone with three-valued logic: names that are lanes are known, all others may be either.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest


def register_markers(config: pytest.Config) -> None:
    """Tell pytest the lane names; reads only the device tables, because every pytest run on the machine comes here."""
    shipped = Path(__file__).parent / "catalog" / "devices.toml"
    own = [config.rootpath / line for line in config.getini("zimage_catalog") or ()]
    for path in [shipped, *own]:
        try:
            devices = tomllib.loads(path.read_text(encoding="utf-8")).get("devices", {})
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
            continue  # the catalogue's own reader reports it, with the file's name, once it is needed
        for name, table in devices.items():
            title = table.get("title", name) if isinstance(table, dict) else name
            config.addinivalue_line("markers", f"{name}: zimage lane: runs on {title}")


def check_expression(expression: str, lanes: Iterable[str], here: str) -> None:
    """Raise `pytest.UsageError` if `-m expression` can select suite tests only on another machine."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body if expression.strip() else None
    except SyntaxError:
        return  # pytest's own parser says it better
    if tree is None or _truth(tree, set(lanes), here) is not False:
        return
    elsewhere = [lane for lane in lanes if lane != here and _truth(tree, set(lanes), lane) is not False]
    if elsewhere:
        raise pytest.UsageError(
            f"-m {expression!r} selects the zimage suite only on {' or '.join(elsewhere)},"
            f" but this machine is {here!r}."
            f" Nothing would run, which must not look green. Run it there, or use -m {here}."
        )


def _truth(node: ast.expr, lanes: set[str], here: str) -> bool | None:
    """Value of a mark expression on the machine `here`; None where it hangs on a marker that is no lane."""
    match node:
        case ast.Name(id=name):
            return name == here if name in lanes else None
        case ast.Constant(value=bool(value)):
            return value
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _truth(operand, lanes, here)
            return None if inner is None else not inner
        case ast.BoolOp(op=op, values=values):
            truths = [_truth(value, lanes, here) for value in values]
            decisive = isinstance(op, ast.Or)
            if decisive in truths:
                return decisive
            return None if None in truths else not decisive
        case _:
            return None
