"""What a ComfyUI server says of itself, as facts for the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pytest_zimage.catalog import Variant
from pytest_zimage.engines.comfyui.log import emulated_ops
from pytest_zimage.engines.comfyui.messages import SystemStats
from pytest_zimage.engines.comfyui.runlog import RunLog
from pytest_zimage.engines.comfyui.workflow import Workflow
from pytest_zimage.engines.servers.session import Seen

_NOT_FAST = (
    "weight_dtype fp8_e4m3fn_fast under dynamic VRAM: ComfyUI casts and multiplies in the compute type, without a word;"
    " with --disable-dynamic-vram it multiplies in FP8"
)
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
) -> Seen:
    """`packages`: versions that it may not tell."""
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
    plain_cast = variant.weight_dtype == "fp8_e4m3fn_fast" and environment.get("comfyui.dynamic_vram") == "enabled"
    partly = [load for load in environment.get("comfyui.loaded", "").split(", ") if load.endswith(" partially")]
    lines = tuple(
        f"{load.removesuffix(' partially')} did not fit into memory and was loaded in part" for load in partly
    )
    return Seen(
        environment=environment,
        emulated=emulated_ops(log.since),
        unquantised=(_NOT_FAST,) if plain_cast else (),
        notes=(*notes, *lines),
    )


def _kept(argv: Sequence[str]) -> Iterator[str]:
    hiding = False
    for word in argv:
        if word.startswith("-"):
            hiding = word.partition("=")[0] in _HIDDEN
        if not hiding:
            yield word
