"""Every option and ini value in one table, turned once into one frozen `Settings`.

Each row is a command-line option and the ini value of the same name (`--zimage-rounds`, `zimage_rounds`); the command
line wins. This module is imported by every pytest run on the machine, so it imports next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from pytest_zimage import readers

UpdateMode = Literal["replace", "extend", "new"]


@dataclass(frozen=True)
class Settings:
    """What the user asked for, checked; one object, made once per pytest process."""

    rootdir: Path
    config: tuple[str, ...]
    """Names, globs and `@tags` of the variants to run; empty means all."""
    engine: str
    models: str
    """`synthetic-tiny`, `synthetic-full`, or a folder in ComfyUI's layout."""
    tokenizer: Path | None
    workload: str | None
    """None: the one that suits the model set."""
    prompts: str
    """The prompt set that image quality is judged on."""
    clip: str | None
    """The scorers; None: those that suit the model set."""
    lpips: str | None
    scorers: Path | None
    """A folder of scorer weights, searched before the usual caches."""
    allow_download: bool
    device: str
    rounds: int
    runs: int | None
    """Fresh runs before the first judgement; None: 1, or 5 when updating baselines."""
    baselines: Path
    local_baselines: Path
    results: Path | None
    strict: bool
    inject: tuple[tuple[str, float | str], ...]
    """Metric and amount: a fraction, bytes for `memory`, a kind of fault for `quality`."""
    update_baselines: bool
    update_reason: str
    update_mode: UpdateMode
    catalog: tuple[Path, ...]
    cache: Path
    timeout_s: float

    @property
    def work(self) -> Path:
        """What a session leaves behind: results, logs, runs, machine-local baselines."""
        return self.rootdir / ".zimage"

    @property
    def fresh_runs(self) -> int:
        return self.runs if self.runs is not None else (5 if self.update_baselines else 1)


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
        "variants to run: a name, a glob, or --zimage-config=@tag; repeatable, commas",
        metavar="NAME",
        many=True,
    ),
    Option("engine", "what draws (default: diffusers, in a process of its own)", metavar="NAME", default="diffusers"),
    Option(
        "models",
        "where the weights are: a folder in ComfyUI's layout, synthetic-tiny or synthetic-full"
        " (default: $ZIMAGE_MODELS if set, else synthetic-tiny)",
        readers.models,
        "DIR|NAME",
    ),
    Option("tokenizer", "folder of the text encoder's tokenizer, if the model folder has none", readers.path, "DIR"),
    Option("workload", "what is drawn (default: turbo-tiny on synthetic-tiny, else turbo-1024)", metavar="NAME"),
    Option("prompts", "prompts and seeds that quality is judged on", metavar="SET", default="quality-6x3"),
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
        " quality=noise:0.05, quality=black, quality=swap-prompts, quality=wrong-seed",
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


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("zimage", "quantised Z-Image Turbo: speed, memory and quality gates")
    for row in OPTIONS:
        if row.flag:
            group.addoption(row.option, dest=row.dest, action="store_true", default=None, help=row.help)
        else:
            group.addoption(
                row.option,
                dest=row.dest,
                action="append" if row.many else "store",
                default=None,
                metavar=row.metavar,
                choices=row.choices or None,
                help=row.help,
            )
        kind: Any = "bool" if row.flag else "linelist" if row.many else "string"
        parser.addini(row.ini, row.help.replace("%%", "%"), type=kind, default=None)
    group.addoption(
        "--zimage-list",
        action="store_true",
        default=False,
        help="list the variants, the files each needs and where they were looked for, then stop",
    )


def given(config: pytest.Config) -> bool:
    """Whether any option of ours stands on the command line."""
    return any(config.getoption(row.dest, None) is not None for row in OPTIONS)


def repeated_options(config: pytest.Config) -> list[str]:
    """The options of this command line that decide what is measured and against what, for a command to run next."""
    again = {"engine", "models", "tokenizer", "workload", "prompts", "clip", "lpips", "scorers", "device", "rounds"}
    again |= {"baselines", "catalog", "cache"}
    words: list[str] = []
    for row in OPTIONS:
        found = config.getoption(row.dest, None)
        if row.prefix == "--zimage-" and row.name in again and found is not None:
            for value in found if row.many else [found]:
                words += [row.option, str(value)]
    return words


def read_settings(config: pytest.Config) -> Settings:
    """Raises `pytest.UsageError` for the first value that cannot be used, naming the option."""
    values: dict[str, Any] = {row.dest: _value(config, row) for row in OPTIONS}
    if values["update_baselines"] and not values["update_reason"]:
        raise pytest.UsageError('--update-baselines needs --update-reason "why the numbers may change"')
    if values["update_baselines"] and values["zimage_inject"]:
        raise pytest.UsageError(
            "--update-baselines refuses --zimage-inject: an injected fault must never become a baseline"
        )
    root = config.rootpath
    renamed = {
        "models": values.pop("zimage_models") or _models_of_environment() or "synthetic-tiny",
        "update_baselines": values.pop("update_baselines"),
        "update_reason": values.pop("update_reason") or "",
        "update_mode": values.pop("update_mode"),
        "baselines": values.pop("zimage_baselines") or root / "baselines",
        "local_baselines": root / ".zimage" / "baselines",
        "cache": values.pop("zimage_cache") or user_cache(),
        "timeout_s": values.pop("zimage_timeout"),
        "catalog": values.pop("zimage_catalog"),
        "rootdir": root,
    }
    rest = {dest.removeprefix("zimage_"): value for dest, value in values.items()}
    settings = Settings(**{**rest, **renamed})
    assert {field.name for field in fields(Settings)} == set(rest) | set(renamed)
    return settings


def _value(config: pytest.Config, row: Option) -> Any:
    raw = config.getoption(row.dest, None)
    source, base = row.option, config.invocation_params.dir
    if raw is None:
        raw = config.getini(row.ini)
        source, base = f"{row.ini} (ini)", config.rootpath
    if row.flag:
        return bool(raw)
    if row.many:
        items = [part for item in (raw or ()) for part in item.split(",") if part.strip()]
        return tuple(row.read(source, item.strip(), base) for item in items)
    if raw is None or raw == "":
        raw = row.default if raw is None or source.endswith("(ini)") else raw
    if raw is None:
        return None
    if row.choices and raw not in row.choices:
        raise pytest.UsageError(f"{source} {raw}: choose from {', '.join(row.choices)}")
    return row.read(source, raw, base)


def _models_of_environment() -> str:
    text = os.environ.get("ZIMAGE_MODELS", "")
    return readers.models("ZIMAGE_MODELS", text, Path.cwd()) if text.strip() else ""


def user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pytest-zimage"
