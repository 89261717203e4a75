"""The table of every option and ini value.

Each row is a command-line option and the ini value of the same name (`--zimage-rounds`, `zimage_rounds`). This module
is imported by every pytest run on the machine, so it imports next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_zimage.options import readers


@dataclass(frozen=True)
class Option:
    """One row: option, ini value, help, how its text is read."""

    name: str
    help: str
    read: Callable[[str, str, Path], Any] = readers.plain_text
    """Option, text, and the folder that a path in it starts from."""
    metavar: str | None = None
    default: str | None = None
    many: bool = False
    flag: bool = False
    choices: tuple[str, ...] = ()
    prefix: str = "--zimage-"
    engine: str = ""
    """The one engine that it is for."""
    way: Literal["", "start", "attach"] = ""
    """For a server that is started, or for one that runs already."""

    @property
    def option(self) -> str:
        return self.prefix + self.name.replace("_", "-")

    @property
    def dest(self) -> str:
        return self.option.removeprefix("--").replace("-", "_")

    @property
    def ini(self) -> str:
        return self.dest if self.dest.startswith("zimage_") else f"zimage_{self.dest}"


OPTIONS: tuple[Option, ...] = (
    Option(
        "config",
        "variants to run: a name, a glob ('*': all), or --zimage-config=@tag; '!' before it: not that; repeatable,"
        " commas (default: those that --zimage-list does not mark)",
        metavar="NAME",
        many=True,
    ),
    Option(
        "engine",
        "what draws: diffusers in a process of its own, or a server, comfyui or vllm-omni (default: diffusers)",
        metavar="NAME",
        default="diffusers",
    ),
    Option("parity", "another engine, which must draw the same pictures: suites/test_parity.py", metavar="ENGINE"),
    Option(
        "models",
        "where the weights are: a folder in ComfyUI's layout, synthetic-tiny or synthetic-full"
        " (default: $ZIMAGE_MODELS if set, else synthetic-tiny)",
        readers.models,
        "DIR|NAME",
    ),
    Option("tokenizer", "folder of the text encoder's tokenizer, if the model folder has none", readers.path, "DIR"),
    Option("workload", "what is drawn (default: turbo-tiny on synthetic-tiny, else turbo-1024)", metavar="NAME"),
    Option(
        "prompts",
        "prompts and seeds that quality is judged on (default: quality-6x3, vllm-3x1 with the vllm-omni engine)",
        metavar="SET",
    ),
    Option(
        "clip",
        "what gives the CLIPScore: ARCH:PRETRAINED in open_clip's words, or tiny-clip"
        " (default: tiny-clip on synthetic weights, else ViT-B-32)",
        metavar="ARCH:PRETRAINED",
    ),
    Option(
        "lpips",
        "what gives LPIPS: alex or tiny-alex (default: tiny-alex on synthetic weights, else alex)",
        choices=("alex", "tiny-alex"),
    ),
    Option("scorers", "folder of scorer weights, searched before the usual caches", readers.path, "DIR"),
    Option("allow_download", "let the hub be asked for scorer weights that are nowhere on this machine", flag=True),
    Option("device", "auto, cpu, cuda or cuda:N (default: auto)", metavar="DEVICE", default="auto"),
    Option("rounds", "timed images in each run (default: 10)", readers.positive_int, "N", "10"),
    Option(
        "runs",
        "fresh processes per variant before the first verdict (default: 1; 5 when updating)",
        readers.positive_int,
        "N",
    ),
    Option("baselines", "folder of the stored baselines (default: baselines in the root folder)", readers.path, "DIR"),
    Option("results", "results file (default: .zimage/results/<time>.json)", readers.path, "FILE"),
    Option("strict", "fail what has no baseline or stays inconclusive, instead of skipping it", flag=True),
    Option(
        "inject",
        "make the worker worse on purpose, to see a gate fail: warm_latency=+5%%, cold_load=+40%%, memory=+500MB,"
        " quality=noise:0.05, quality=black, quality=swap-prompts, quality=wrong-seed,"
        " dispatch=fallback, dispatch=dequantise, fitness=throttle, fitness=process, fitness=canary:0.8",
        readers.injection,
        "METRIC=AMOUNT",
        many=True,
    ),
    Option(
        "catalog",
        "TOML files with your own variants, workloads or devices; repeatable",
        readers.path,
        "FILE",
        many=True,
    ),
    Option("cache", "folder for synthetic checkpoints (default: the user's cache folder)", readers.path, "DIR"),
    Option(
        "timeout",
        "longest silence of a worker in seconds before it is ended (default: 300)",
        readers.seconds,
        "SECONDS",
        "300",
    ),
    Option(
        "fit_wait",
        "longest wait of a run for a machine that is not fit to be timed, in seconds; 0: neither wait nor time again"
        " (default: 60)",
        readers.seconds_or_none,
        "SECONDS",
        "60",
    ),
    Option(
        "comfyui_dir",
        "ComfyUI's folder: a server is started from it for every run",
        readers.path,
        "DIR",
        engine="comfyui",
        way="start",
    ),
    Option(
        "comfyui_python",
        "the Python that runs ComfyUI (default: this one)",
        readers.path,
        "FILE",
        engine="comfyui",
        way="start",
    ),
    Option(
        "comfyui_flags",
        "further flags of ComfyUI's main.py, as one shell text",
        readers.words,
        "TEXT",
        "",
        engine="comfyui",
        way="start",
    ),
    Option(
        "comfyui_url",
        "a ComfyUI that runs already, instead of starting one",
        readers.url,
        "URL",
        engine="comfyui",
        way="attach",
    ),
    Option(
        "comfyui_pid",
        "its process, to read its memory",
        readers.positive_int,
        "PID",
        engine="comfyui",
        way="attach",
    ),
    Option(
        "comfyui_workflow",
        "a workflow of your own in ComfyUI's API format, nodes named",
        readers.path,
        "FILE",
        engine="comfyui",
    ),
    Option(
        "vllm_omni_command",
        "the vllm executable (default: vllm)",
        metavar="FILE",
        default="vllm",
        engine="vllm-omni",
        way="start",
    ),
    Option(
        "vllm_omni_flags",
        "further flags of vllm serve, as one shell text",
        readers.words,
        "TEXT",
        "",
        engine="vllm-omni",
        way="start",
    ),
    Option(
        "vllm_omni_url",
        "a vLLM-Omni that runs already, instead of starting one",
        readers.url,
        "URL",
        engine="vllm-omni",
        way="attach",
    ),
    Option(
        "vllm_omni_pid",
        "its process, to read its memory",
        readers.positive_int,
        "PID",
        engine="vllm-omni",
        way="attach",
    ),
    Option("baselines", "record what is measured as the new baseline", flag=True, prefix="--update-"),
    Option("reason", "why the baselines change; required with --update-baselines", metavar="TEXT", prefix="--update-"),
    Option(
        "mode",
        "replace the recorded runs, extend them, or only add what is new (default: replace)",
        choices=("replace", "extend", "new"),
        default="replace",
        prefix="--update-",
    ),
)
