"""Noise levels of a workload before its shift, as plain numbers that every engine can be held against."""

from __future__ import annotations

_TABLE = 1000
"""Levels that ComfyUI keeps of a model that steps by flow matching."""


def simple_levels(steps: int) -> list[float]:
    """ComfyUI's `simple` schedule, from 1 down, without the 0 after the last step.

    Level i is entry `int(i * (1000 / steps))` from the top of a table of 1000 evenly spaced ones (comfy/samplers.py,
    `simple_scheduler`): `1 - i / steps` only where `steps` divides 1000.
    """
    stride = _TABLE / steps
    return [1 - int(step * stride) / _TABLE for step in range(steps)]


def is_evenly_spaced(steps: int) -> bool:
    """Whether `simple_levels` are the evenly spaced ones that diffusers and vLLM-Omni step through."""
    return _TABLE % steps == 0
