"""How a ComfyUI of our own is started: its command, and a folder in which it sees one variant's files and no others."""

from __future__ import annotations

import json
import subprocess
from functools import cached_property
from pathlib import Path

from pytest_zimage.catalog import ROLE_FOLDERS, Role, Variant
from pytest_zimage.engines.base import RunPlan
from pytest_zimage.engines.comfyui.support import needed_flags
from pytest_zimage.engines.processes import child_environment
from pytest_zimage.errors import EngineError, UnsupportedError

_HELP_S = 120.0
_QUIET: tuple[tuple[str, ...], ...] = (
    ("--disable-auto-launch",),
    ("--preview-method", "none"),
    # The image's file then holds pixels only, and its size does not depend on the workflow.
    ("--disable-metadata",),
    ("--disable-all-custom-nodes",),
    ("--disable-api-nodes",),
    ("--database-url", "sqlite:///:memory:"),
)
"""Given where this version knows them: an unknown flag ends ComfyUI at its start."""
_FOLDERS = ("output", "temp", "user", "input")
_DEVICES = frozenset({"--cpu", "--gpu-only", "--highvram", "--normalvram", "--lowvram", "--novram"})


def help_text(python: Path, folder: Path) -> str:
    """What this ComfyUI says of its flags. Raises `EngineError` if it cannot be run."""
    command = [str(python), "main.py", "--help"]
    try:
        done = subprocess.run(
            command, cwd=folder, env=child_environment(""), capture_output=True, text=True, timeout=_HELP_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(
            f"ComfyUI in {folder} cannot be run: {error}", mend="check --zimage-comfyui-python"
        ) from error
    if done.returncode or "--listen" not in done.stdout:
        raise EngineError(
            f"ComfyUI in {folder} does not list its flags; exit status {done.returncode}: {done.stderr.strip()[-500:]}",
            mend=f"run it by hand: cd {folder} && {' '.join(command)}; its python is --zimage-comfyui-python",
        )
    return done.stdout


def kitchen_version(python: Path) -> str:
    """comfy-kitchen's, which servers tell only since 0.33; empty where there is none."""
    ask = "import importlib.metadata as m; print(m.version('comfy-kitchen'))"
    done = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, timeout=_HELP_S, check=False)
    return "" if done.returncode else done.stdout.strip()


class Installation:
    """A ComfyUI that can be started, and the user's flags for it. What it says of itself is asked once."""

    def __init__(self, folder: Path, python: Path, flags: tuple[str, ...]) -> None:
        self.folder, self.python, self.flags = folder, python, flags

    def __str__(self) -> str:
        return f"{self.folder} with {self.python}"

    @cached_property
    def help(self) -> str:
        """Of its flags; raises `EngineError` as `help_text` does."""
        return help_text(self.python, self.folder)

    @cached_property
    def kitchen(self) -> str:
        return kitchen_version(self.python)


class Launch:
    """The command of one server. `home` is its private folder, there and empty."""

    def __init__(self, plan: RunPlan, flags: tuple[str, ...], python: Path, known: str, home: Path) -> None:
        """`flags` are the user's, `known` what the server says of its flags.

        Raises `UnsupportedError` if this version lacks a flag that the variant needs.
        """
        self._python, self._home = python, home
        self._flags = [*flags, *self._own(plan, flags, known)]
        for name in _FOLDERS:
            (home / name).mkdir()
        self.names = _linked(plan, home / "models")

    def command(self, port: int) -> list[str]:
        # What must hold stands last, where it outranks the user's.
        return [str(self._python), "main.py", *self._flags, "--listen", "127.0.0.1", "--port", str(port)]

    def _own(self, plan: RunPlan, flags: tuple[str, ...], known: str) -> list[str]:
        offered = set(known.replace("[", " ").replace("]", " ").replace(",", " ").split())
        own = [word for words in _QUIET if words[0] in offered and words[0] not in flags for word in words]
        for name in _FOLDERS:
            own += [f"--{name}-directory", str(self._home / name)] if f"--{name}-directory" in offered else []
        if plan.device == "cpu" and not _DEVICES & {*flags}:
            own.append("--cpu")
        own += ["--extra-model-paths-config", str(_written_paths(self._home))]
        return [*own, *_needed(plan.variant, flags, offered)]


def _needed(variant: Variant, flags: tuple[str, ...], offered: set[str]) -> list[str]:
    needed = [flag for flag in needed_flags(variant) if flag not in flags]
    if missing := [flag for flag in needed if flag not in offered]:
        raise UnsupportedError(
            f"{variant.name}: this version of ComfyUI has no {' '.join(missing)}, which the variant needs",
            mend="update ComfyUI, or leave the variant out of --zimage-config",
        )
    return needed


def _linked(plan: RunPlan, models: Path) -> dict[Role, str]:
    """Links to the files, laid out as the model set is; their names by role.

    ComfyUI brings its own tokenizer; one that is made to take a synthetic set looks for that set's.
    """
    for role, folders in ROLE_FOLDERS.items():
        (models / folders[0]).mkdir(parents=True)
        if role in plan.files:
            (models / folders[0] / plan.files[role].name).symlink_to(plan.files[role].resolve())
    if plan.tokenizer is not None:
        (models / "tokenizer").symlink_to(plan.tokenizer.resolve())
    return {role: path.name for role, path in plan.files.items()}


def _written_paths(home: Path) -> Path:
    """The file that names the folders; JSON is YAML too. `is_default`: they are searched before ComfyUI's own."""
    folders = {folders[0]: folders[0] for folders in ROLE_FOLDERS.values()}
    paths = home / "model_paths.yaml"
    paths.write_text(
        json.dumps({"zimage": {"base_path": str(home / "models"), "is_default": True, **folders}}), encoding="utf-8"
    )
    return paths
