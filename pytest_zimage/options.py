"""Every option and ini value in one table, turned once into one frozen `Settings`.

Each row is a command-line option and the ini value of the same name (`--zimage-rounds`, `zimage_rounds`); the command
line wins. This module is imported by every pytest run on the machine, so it imports next to nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

UpdateMode = Literal["replace", "extend", "new"]

_AMOUNT = re.compile(r"\+?(\d+(?:\.\d+)?)\s*(%|KB|MB|GB|KiB|MiB|GiB|B)")
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


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
    device: str
    rounds: int
    runs: int | None
    """Fresh runs before the first judgement; None: 1, or 5 when updating baselines."""
    baselines: Path
    local_baselines: Path
    results: Path | None
    strict: bool
    inject: tuple[tuple[str, float], ...]
    """Metric and amount: a fraction, or bytes for `memory`."""
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


def _positive_int(option: str, text: str, base: Path) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise pytest.UsageError(f"{option} {text}: must be a whole number of at least 1")
    return value


def _seconds(option: str, text: str, base: Path) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise pytest.UsageError(f"{option} {text}: must be a number of seconds above 0")
    return value


def _injection(option: str, text: str, base: Path) -> tuple[str, float]:
    metric, _, amount = text.partition("=")
    match = _AMOUNT.fullmatch(amount.strip())
    known = {"warm_latency": "%", "cold_load": "%", "memory": "B"}
    if metric not in known or not match or (match[2] == "%") != (known[metric] == "%") or float(match[1]) <= 0:
        raise pytest.UsageError(
            f"{option} {text}: write METRIC=AMOUNT, for example warm_latency=+5%, cold_load=+40% or memory=+500MB"
        )
    number = float(match[1])
    return metric, number / 100 if match[2] == "%" else number * _BYTES[match[2]]


def _text(option: str, text: str, base: Path) -> str:
    if not text.strip():
        raise pytest.UsageError(f"{option}: must not be empty")
    return text.strip()


def _path(option: str, text: str, base: Path) -> Path:
    return base / Path(_text(option, text, base)).expanduser()


def _models(option: str, text: str, base: Path) -> str:
    """A folder by its whole path; what is no folder stays a name."""
    name = _text(option, text, base)
    folder = base / Path(name).expanduser()
    return str(folder) if "/" in name or (folder.is_dir() and not name.startswith("synthetic-")) else name


@dataclass(frozen=True)
class Option:
    """One row: option, ini value, help, how its text is read."""

    name: str
    help: str
    read: Callable[[str, str, Path], Any] = _text
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
        _models,
        "DIR|NAME",
    ),
    Option("tokenizer", "folder of the text encoder's tokenizer, if the model folder has none", _path, "DIR"),
    Option("workload", "what is drawn (default: turbo-tiny on synthetic-tiny, else turbo-1024)", metavar="NAME"),
    Option("device", "auto, cpu, cuda or cuda:N (default: auto)", metavar="DEVICE", default="auto"),
    Option("rounds", "timed images in each run (default: 10)", _positive_int, "N", "10"),
    Option(
        "runs", "fresh processes per variant before the first verdict (default: 1; 5 when updating)", _positive_int, "N"
    ),
    Option("baselines", "folder of the stored baselines (default: baselines in the root folder)", _path, "DIR"),
    Option("results", "results file (default: .zimage/results/<time>.json)", _path, "FILE"),
    Option("strict", "fail what has no baseline or stays inconclusive, instead of skipping it", flag=True),
    Option(
        "inject",
        "slow or enlarge the worker on purpose, to see a gate fail: warm_latency=+5%%, cold_load=+40%%, memory=+500MB",
        _injection,
        "METRIC=AMOUNT",
        many=True,
    ),
    Option("catalog", "TOML files with your own variants, workloads or devices; repeatable", _path, "FILE", many=True),
    Option("cache", "folder for synthetic checkpoints (default: the user's cache folder)", _path, "DIR"),
    Option(
        "timeout",
        "longest silence of a worker in seconds before it is ended (default: 300)",
        _seconds,
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
    again = ("engine", "models", "tokenizer", "workload", "device", "rounds", "baselines", "catalog", "cache")
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
    _refuse_folder_taken_for_tests(config)
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
    return _models("ZIMAGE_MODELS", text, Path.cwd()) if text.strip() else ""


def _refuse_folder_taken_for_tests(config: pytest.Config) -> None:
    """pytest looks for its ini file before it knows our options, and takes a folder after a space for one of tests.

    Where that led it away from here, ini values would be lost and results land in a stranger's folder.
    """
    told_where = config.getoption("inifilename", None) or config.getoption("rootdir", None)
    if told_where or config.args_source is pytest.Config.ArgsSource.ARGS:
        return
    here = config.invocation_params.dir
    if config.rootpath == here if config.inipath is None else here.is_relative_to(config.inipath.parent):
        return
    for row in OPTIONS:
        value = config.getoption(row.dest, None)
        for text in value if isinstance(value, list) else [value]:
            if text in config.invocation_params.args and (here / text).exists():
                raise pytest.UsageError(
                    f"pytest took {text} for a folder of tests and looked for its ini file there:"
                    f" write {row.option}={text}"
                )


def user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pytest-zimage"
