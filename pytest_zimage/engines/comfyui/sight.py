"""What a ComfyUI server says of itself, as facts for the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pytest_zimage.catalog import Variant
from pytest_zimage.engines.comfyui.log import emulated_ops
from pytest_zimage.engines.comfyui.messages import SystemStats
from pytest_zimage.engines.comfyui.runlog import RunLog
from pytest_zimage.engines.comfyui.workflow import Workflow
from pytest_zimage.engines.servers.session import Seen

_FP8_CAPABILITY = (8, 9)
"""From here on NVIDIA's GPUs multiply in FP8."""
_PRETENDS = "--supports-fp8-compute"
_HIDDEN = frozenset(
    (
        *("--listen", "--port", "--tls-keyfile", "--tls-certfile", "--database-url", "--front-end-root"),
        *("--extra-model-paths-config", "--base-directory", "--models-directory"),
        *("--output-directory", "--temp-directory", "--user-directory", "--input-directory"),
    )
)
"""Flags that say where a server is, and nothing of how it computes: left out with the values behind them."""


def sight(
    stats: SystemStats,
    log: RunLog,
    variant: Variant,
    workflow: Workflow,
    notes: tuple[str, ...],
    packages: Mapping[str, str],
    capability: str = "",
) -> Seen:
    """`packages`: versions that it may not tell; `capability` is the GPU's compute capability where it is known."""
    system = stats.system
    found = {
        "": system.comfyui_version,
        "python": system.python_version.partition(" ")[0],
        "torch": system.pytorch_version,
        "argv": " ".join(_kept(system.argv[1:])),
        "workflow": workflow.identity,
        **packages,
        **{one.name: one.installed or "" for one in system.comfy_package_versions},
        **log.facts(),
    }
    environment = {f"comfyui.{name}".rstrip("."): value for name, value in found.items() if value}
    partly = [load for load in environment.get("comfyui.loaded", "").split(", ") if load.endswith(" partially")]
    lines = tuple(
        f"{load.removesuffix(' partially')} did not fit into memory and was loaded in part" for load in partly
    )
    return Seen(
        environment=environment,
        emulated=emulated_ops(log.since),
        unquantised=_why_plain(variant, stats, environment, capability),
        notes=(*notes, *lines),
    )


def _why_plain(
    variant: Variant, stats: SystemStats, environment: Mapping[str, str], capability: str
) -> tuple[str, ...]:
    """Why it casts where the variant is to multiply in FP8, which it never says; empty where nothing tells."""
    if variant.weight_dtype != "fp8_e4m3fn_fast":
        return ()
    pretends = _PRETENDS in stats.system.argv
    release = tuple(int(part) for part in capability.split(".") if part.isdecimal())
    if stats.devices and stats.devices[0].type == "cpu" and not pretends:
        where = "on a CPU"
    elif release and release < _FP8_CAPABILITY and not pretends:
        where = f"on a GPU of compute capability {capability}, below {'.'.join(map(str, _FP8_CAPABILITY))}"
    elif environment.get("comfyui.dynamic_vram") == "enabled":
        where = "under dynamic VRAM, which --disable-dynamic-vram turns off"
    else:
        return ()
    return (f"fp8_e4m3fn_fast {where}: ComfyUI casts and multiplies in the compute type, without a word",)


def _kept(argv: Sequence[str]) -> Iterator[str]:
    hiding = False
    for word in argv:
        if word.startswith("-"):
            hiding = word.partition("=")[0] in _HIDDEN
        if not hiding:
            yield word
