"""Where a metric's baseline lives: what does not depend on the machine is stored once for all of them."""

from __future__ import annotations

from typing import Literal

from msgspec import structs

from pytest_zimage.baselines.schema import Key
from pytest_zimage.catalog.model import DeviceClass, Metric

Layer = Literal["portable", "device", "machine"]
"""`portable`: the same anywhere. `device`: one device class. `machine`: this very machine, outside the repository."""

PORTABLE = "portable"
"""Stands for the device class in the key and the path of a portable baseline."""
_CHOSEN_BY_DEVICE = frozenset({"linears"})
"""Exact, but decided by what the device can compute; any CPU decides alike."""


def layer_of(metric: Metric, device: DeviceClass) -> Layer:
    """The layer that `metric` is stored in and judged from on `device`."""
    if metric.kind == "exact":
        return "device" if metric.name in _CHOSEN_BY_DEVICE and device.name != "cpu" else "portable"
    return "device" if device.stored_timings else "machine"


def layer_key(key: Key, layer: Layer) -> Key:
    """`key` as the files of `layer` carry it."""
    return structs.replace(key, device=PORTABLE) if layer == "portable" else key
