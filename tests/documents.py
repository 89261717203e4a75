"""JSON documents with one mistake in them."""

from __future__ import annotations

import copy
from typing import Any


def changed(document: Any, where: str, value: Any) -> Any:
    """A copy with the field at the dotted path `where` set to `value`, or removed where that is `...`."""
    document = copy.deepcopy(document)
    *parents, last = (int(part) if part.isdigit() else part for part in where.split("."))
    node = document
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return document
