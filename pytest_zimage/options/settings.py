"""The options of the table, turned once into one frozen `Settings`; the command line outranks the ini file.

Imported by every pytest run on the machine, so it imports next to nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from pytest_zimage.options import readers
from pytest_zimage.options.engines import outranked, refuse_others, refuse_unnamed_weights, told
from pytest_zimage.options.table import OPTIONS, Option

UpdateMode = Literal["replace", "extend", "new"]


@dataclass(frozen=True)
class Settings:
    """What the user asked for, checked; one object, made once per pytest process."""

    rootdir: Path
    config: tuple[str, ...]
    """Names, globs and `@tags` of the variants to run; empty means all."""
    engine: str
    parity: str | None
    """Another engine, which must draw the same pictures; None: nothing is compared."""
    models: str
    """`synthetic-tiny`, `synthetic-full`, or a folder in ComfyUI's layout."""
    tokenizer: Path | None
    workload: str | None
    """None: the one that suits the model set."""
    prompts: str | None
    """The prompt set that image quality is judged on; None: the engine's own."""
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
    fit_wait_s: float
    """Longest wait of a run until the machine is fit to be timed."""
    comfyui_dir: Path | None
    """ComfyUI's folder, to start it from; or else `comfyui_url`, of one that runs."""
    comfyui_python: Path | None
    """None: the Python that runs pytest."""
    comfyui_flags: tuple[str, ...]
    comfyui_url: str | None
    comfyui_pid: int | None
    """The server's process, for its memory, where it was not started here."""
    comfyui_workflow: Path | None
    vllm_omni_command: str
    """Executable of `vllm serve`, to start it; or else `vllm_omni_url`, of a server that runs."""
    vllm_omni_flags: tuple[str, ...]
    vllm_omni_url: str | None
    vllm_omni_pid: int | None

    @property
    def work(self) -> Path:
        """What a session leaves behind: results, logs, runs, machine-local baselines."""
        return self.rootdir / ".zimage"

    @property
    def fresh_runs(self) -> int:
        return self.runs if self.runs is not None else (5 if self.update_baselines else 1)


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
        help="list the variants, the files each needs, where they were looked for and where each was seen, then stop",
    )


def given(config: pytest.Config) -> bool:
    """Whether any option of ours stands on the command line."""
    return any(told(config, row) for row in OPTIONS)


def repeated_options(config: pytest.Config) -> list[str]:
    """What of this command line decides what is measured and against what, for a command to run next.

    Options, and ini values given by `-o` that no option outranks.
    """
    again = {"engine", "models", "tokenizer", "workload", "prompts", "clip", "lpips", "scorers", "device", "rounds"}
    again |= {"parity", "baselines", "catalog", "cache"}
    again |= {row.name for row in OPTIONS if row.engine}
    overridden = _overridden_ini(config)
    words: list[str] = []
    for row in OPTIONS:
        if row.prefix != "--zimage-" or row.name not in again:
            continue
        if (found := config.getoption(row.dest, None)) is not None:
            for value in found if row.many else [found]:
                # With a space, pytest would take a folder for one of tests, and flags for its own.
                words.append(f"{row.option}={value}")
        elif row.ini in overridden:
            # Not as the option: a relative path would start from another folder.
            words += ["-o", f"{row.ini}={overridden[row.ini]}"]
    return words


def _overridden_ini(config: pytest.Config) -> dict[str, str]:
    """The ini values that `-o` gives on the command line; of several for one name pytest takes the last."""
    parts = (text.partition("=") for text in config.getoption("override_ini", None) or ())
    return {name: value for name, _, value in parts}


def read_settings(config: pytest.Config) -> Settings:
    """Raises `pytest.UsageError` for the first value that cannot be used, naming the option."""
    ignored = outranked(config)
    values: dict[str, Any] = {row.dest: _value(config, row, ini=row.dest not in ignored) for row in OPTIONS}
    drawing = {values["zimage_engine"], values["zimage_parity"] or values["zimage_engine"]}
    refuse_others(config, drawing)
    if values["update_baselines"] and not values["update_reason"]:
        raise pytest.UsageError('--update-baselines needs --update-reason "why the numbers may change"')
    for needless in ("update_reason", "update_mode"):
        if not values["update_baselines"] and config.getoption(needless, None) is not None:
            option = f"--{needless.replace('_', '-')}"
            raise pytest.UsageError(f"{option} records nothing by itself: add --update-baselines, or leave it out")
    if values["update_baselines"] and values["zimage_inject"]:
        raise pytest.UsageError(
            "--update-baselines refuses --zimage-inject: an injected fault must never become a baseline"
        )
    root = config.rootpath
    models = values.pop("zimage_models") or _models_of_environment()
    if not models:
        refuse_unnamed_weights(config, drawing, values)
    renamed = {
        "models": models or "synthetic-tiny",
        "update_baselines": values.pop("update_baselines"),
        "update_reason": values.pop("update_reason") or "",
        "update_mode": values.pop("update_mode"),
        "baselines": values.pop("zimage_baselines") or root / "baselines",
        "local_baselines": root / ".zimage" / "baselines",
        "cache": values.pop("zimage_cache") or user_cache(),
        "timeout_s": values.pop("zimage_timeout"),
        "fit_wait_s": values.pop("zimage_fit_wait"),
        "catalog": values.pop("zimage_catalog"),
        "rootdir": root,
    }
    rest = {dest.removeprefix("zimage_"): value for dest, value in values.items()}
    settings = Settings(**{**rest, **renamed})
    assert {field.name for field in fields(Settings)} == set(rest) | set(renamed)
    return settings


def _value(config: pytest.Config, row: Option, *, ini: bool = True) -> Any:
    """`ini`: whether the ini file may say it."""
    raw = config.getoption(row.dest, None)
    source, base = row.option, config.invocation_params.dir
    if raw is None and ini:
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
