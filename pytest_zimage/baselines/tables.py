"""Reading a published table: JSON of a known shape, with errors that name file and field."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from pytest_zimage.errors import BaselineError

Table = TypeVar("Table")


def read_as(path: Path, kind: type[Table], *, fields_in: str) -> Table:
    """`fields_in` says where a reader finds the fields. Raises `BaselineError` naming file and field."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise BaselineError(f"{path}: cannot be read: {error.strerror}", mend="name the table's JSON file") from error
    except msgspec.MsgspecError as error:
        raise BaselineError(f"{path}: not such a table: {error}", mend=f"its fields are in {fields_in}") from error
