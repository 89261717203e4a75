"""The `comfyui` engine: a ComfyUI started for every run, or one that runs already.

It is made when tests are collected, so what talks to a server is imported when there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_zimage.catalog import Variant, Workload
from pytest_zimage.engines.base import ReportProgress, RunPlan
from pytest_zimage.engines.comfyui.launch import Installation
from pytest_zimage.engines.comfyui.support import refuse_changed_prompt, refuse_unsupported
from pytest_zimage.engines.comfyui.workflow import build_workflow
from pytest_zimage.engines.servers.engine import ServerEngine
from pytest_zimage.engines.servers.ways import check_way
from pytest_zimage.errors import UnsupportedError
from pytest_zimage.options import Settings

if TYPE_CHECKING:
    from pytest_zimage.engines.comfyui.session import ComfyUISession


class ComfyUIEngine(ServerEngine):
    """Draws the published workflow, or one's own, on a real ComfyUI."""

    name = "comfyui"

    def __init__(self, settings: Settings) -> None:
        """Raises `UnsupportedError` for settings that name no ComfyUI, or two, or a file that is not there."""
        check_way(
            "--zimage-comfyui",
            starting={
                "--zimage-comfyui-dir": settings.comfyui_dir,
                "--zimage-comfyui-python": settings.comfyui_python,
                "--zimage-comfyui-flags": settings.comfyui_flags,
            },
            url=settings.comfyui_url,
            pid=settings.comfyui_pid,
        )
        self._workflow = settings.comfyui_workflow
        self._url, self.attached_pid = settings.comfyui_url, settings.comfyui_pid
        self._known: dict[str, str] = {}
        """What the log of one that runs already said of its start."""
        # One that runs already has weights of its own keeping.
        self.needs_files = self._url is None
        self._installation = _installation(settings) if self._url is None else None

    @property
    def way(self) -> str:
        return f"attaches to the one at {self._url}" if self._url else f"starts {self._installation} for every run"

    def refuse(self, variant: Variant, workload: Workload) -> None:
        refuse_unsupported(variant, own_workflow=self._workflow is not None)
        refuse_changed_prompt(workload)
        build_workflow(variant, workload, self._workflow)

    def reads(self, variant: Variant, model_set: str) -> str:
        return f"{', '.join(variant.files().values())}, as the server itself has them"

    @contextmanager
    def open(self, plan: RunPlan, progress: ReportProgress) -> Iterator[ComfyUISession]:
        """Raises `UnsupportedError`, before anything is started, for a variant or a workflow that cannot be drawn."""
        from pytest_zimage.engines.comfyui.opening import attached, started

        refuse_unsupported(plan.variant, own_workflow=self._workflow is not None)
        workflow = build_workflow(plan.variant, plan.workload, self._workflow)
        opened = (
            started(self._installation, plan, workflow, progress)
            if self._installation is not None
            else attached(self._url or "", self.attached_pid, self._known, plan, workflow, progress)
        )
        with opened as session:
            yield session


def _installation(settings: Settings) -> Installation:
    folder, python = settings.comfyui_dir, settings.comfyui_python or Path(sys.executable)
    if folder is None:
        raise UnsupportedError(
            "the comfyui engine has no ComfyUI to draw with",
            mend="name its folder, --zimage-comfyui-dir=DIR, or one that runs already, --zimage-comfyui-url=URL",
        )
    if not (folder / "main.py").is_file():
        raise UnsupportedError(f"no ComfyUI in {folder}: it has no main.py", mend="check --zimage-comfyui-dir")
    if not python.is_file():
        raise UnsupportedError(f"{python}: no such file to run ComfyUI with", mend="check --zimage-comfyui-python")
    return Installation(folder, python, settings.comfyui_flags)
