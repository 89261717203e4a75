"""Where a metric's baseline lives: what does not depend on the machine is stored once for all of them."""

from __future__ import annotations

from typing import Literal, assert_never

from msgspec import structs

from pytest_zimage.baselines.schema import Key
from pytest_zimage.catalog.device_class import DeviceClass
from pytest_zimage.catalog.model import Metric

Layer = Literal["portable", "device", "machine"]
"""`portable`: the same anywhere. `device`: one device class. `machine`: this very machine, outside the repository."""

PORTABLE = "portable"
"""Stands for the device class in the key and the path of a portable baseline."""
IMAGES = "images"
"""Stands for a metric where the fingerprints and previews of a file are meant."""


def layer_of(metric: Metric, device: DeviceClass) -> Layer:
    """The layer that `metric` is stored in and judged from on `device`.

    Image scores are portable between CPUs, because the margins of the rule are far wider than what the order of a sum
    changes, and belong to the device class elsewhere, where other kernels quantise other things.
    """
    return _layer(metric.portable or _BY_KIND[metric.kind], device)


def layer_of_images(device: DeviceClass) -> Layer:
    """Fingerprints lie with the scores of the images they are of.

    Another CPU may differ in the last bit of a pixel, which is no fault: a fingerprint is never a gate. Equal ones end
    the argument, others only start it, and `BaseImages.drawn_on` says where they come from.
    """
    return _layer(_BY_KIND["paired"], device)


_Portable = Literal["always", "between-cpus", "never"]
_BY_KIND: dict[str, _Portable] = {"exact": "always", "sampled": "never", "paired": "between-cpus"}


def _layer(portable: _Portable, device: DeviceClass) -> Layer:
    match portable:
        case "always":
            return "portable"
        case "between-cpus":
            return "portable" if device.name == "cpu" else "device"
        case "never":
            return "device" if device.stored_timings else "machine"
    assert_never(portable)


def layer_key(key: Key, layer: Layer) -> Key:
    """`key` as the files of `layer` carry it."""
    return structs.replace(key, device=PORTABLE) if layer == "portable" else key
