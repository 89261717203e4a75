"""What the versions of vLLM-Omni make of the same request: which of it is handled here, and which is refused.

Read in the wheels 0.14 to 0.30. A server tells the version of vLLM; vLLM-Omni's has the same major and minor number, or
its log says that it has not.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pytest_zimage.catalog import Workload
from pytest_zimage.engines.schedule import is_evenly_spaced
from pytest_zimage.errors import UnsupportedError

_OLDEST, _NEWEST = (0, 14), (0, 30)
_GENERATOR_DEVICE = (0, 16)
_FORCED_GUIDANCE = (0, 18)
"""From here on a guidance of 0.0 was read as absent, and so as 1.0, until `_ZERO_IS_ZERO`."""
_ZERO_IS_ZERO = (0, 26)
_OWN_SHIFT = 3.0
_NUMBERS = re.compile(r"v?(\d{1,4})\.(\d{1,4})(?!\d)")


class Version(NamedTuple):
    """A release by its two first numbers, and as the server wrote it."""

    major: int
    minor: int
    text: str

    @property
    def release(self) -> tuple[int, int]:
        return self.major, self.minor

    @property
    def takes_generator_device(self) -> bool:
        """Before 0.16 the field is not known and noise is drawn on the GPU."""
        return self.release >= _GENERATOR_DEVICE


def parse(text: str) -> Version:
    """Raises `UnsupportedError` for text that is no version, and for one older than any that was looked at."""
    match = _NUMBERS.match(text.strip())
    found = (int(match[1]), int(match[2])) if match else None
    if found is None or found < _OLDEST:
        raise UnsupportedError(
            f"the server says its version is {text[:40]!r}: what it makes of a guidance of 0 is not known of that",
            mend="use a release of vLLM-Omni: 0.14, 0.16, or 0.26 and newer",
        )
    return Version(*found, text.strip()[:40])


def check(version: Version, workload: Workload, *, same_schedule: bool) -> None:
    """Raises `UnsupportedError` for a workload that this version would draw as another one."""
    check_workload(workload)
    release = version.release
    if workload.guidance == 0 and _FORCED_GUIDANCE <= release < _ZERO_IS_ZERO:
        raise UnsupportedError(
            f"vLLM-Omni {version.text} reads guidance_scale 0.0 as absent and draws Z-Image with classifier-free"
            " guidance: two forwards a step, and another picture. So do 0.18 to 0.24, and nothing turns it off",
            mend="use vLLM-Omni 0.26 or newer, which has the fix (its pull request 5056), or 0.16",
        )
    if 0 < workload.guidance <= 1 and release < _FORCED_GUIDANCE:
        raise UnsupportedError(
            f"vLLM-Omni {version.text} draws without guidance up to a scale of 1; {workload.name} has"
            f" {workload.guidance:g}",
            mend="use vLLM-Omni 0.26 or newer",
        )
    if same_schedule and not is_evenly_spaced(workload.steps):
        raise UnsupportedError(
            f"vLLM-Omni's noise levels are evenly spaced before the shift; those of {workload.name}, ComfyUI's"
            f" {workload.schedule!r} in {workload.steps} steps, are not: they come from a table of 1000",
            mend="compare in a number of steps that divides 1000, for example --zimage-workload turbo-1024x512",
        )
    if same_schedule and not version.takes_generator_device:
        raise UnsupportedError(
            f"vLLM-Omni {version.text} draws its noise on the GPU: no other engine can draw the same picture",
            mend="use vLLM-Omni 0.16, or 0.26 and newer",
        )
    if same_schedule and release > _NEWEST:
        raise UnsupportedError(
            f"which noise levels vLLM-Omni {version.text} steps through has not been looked at; up to 0.30 the last of"
            " its steps does nothing",
            mend="use vLLM-Omni 0.26 to 0.30 where its images are held against another engine's",
        )


def check_workload(workload: Workload) -> None:
    """Raises `UnsupportedError` for what no version can draw."""
    if workload.sampler != "euler":
        raise UnsupportedError(
            f"vLLM-Omni draws Z-Image with the euler sampler only; {workload.name} has {workload.sampler}",
            mend="choose a workload with euler, for example --zimage-workload turbo-1024x512",
        )
    if workload.shift != _OWN_SHIFT:
        raise UnsupportedError(
            f"vLLM-Omni draws Z-Image with the model's own shift of {_OWN_SHIFT:g}; {workload.name} has"
            f" {workload.shift:g}",
            mend="choose a workload with shift 3, for example --zimage-workload turbo-1024x512",
        )


def steps_sent(workload: Workload, *, same_schedule: bool) -> int:
    """What to send for the workload's steps.

    N steps are N forwards at N - 1 noise levels, the last one at level 0 for nothing: one more makes the noise levels
    those of the other engines. The published figures are of the number as it stands.
    """
    return workload.steps + 1 if same_schedule else workload.steps


def useful_steps(version: Version, sent: int) -> str:
    """How many of `sent` steps change the image, as a figure of the environment."""
    return f"{sent - 1} of {sent}" if version.release <= _NEWEST else f"unknown of {sent}"
