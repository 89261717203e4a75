"""vLLM-Omni as an engine: a server started for every run, or one that runs already.

It is made when tests are collected, so what talks to a server is imported when there is one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from pytest_zimage.catalog import Variant, Workload
from pytest_zimage.checkpoints.modelset import file_fingerprint
from pytest_zimage.engines.base import Defaults, ReportProgress, RunPlan
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.engines.servers.engine import ServerEngine
from pytest_zimage.engines.servers.ways import check_way
from pytest_zimage.engines.vllm_omni import launch, metrics, pipeline, versions
from pytest_zimage.errors import UnsupportedError

if TYPE_CHECKING:
    from pytest_zimage.catalog import Role
    from pytest_zimage.engines.vllm_omni.session import VllmOmniSession
    from pytest_zimage.options import Settings

_COMMAND = "vllm"
"""Where nothing is said."""


class VllmOmniEngine(ServerEngine):
    """Draws with `vllm serve MODEL --omni`, in its own process or where `--zimage-vllm-omni-url` says."""

    name = "vllm-omni"
    needs_files = False
    loads_at_start = True
    defaults = Defaults(
        variants=("@pass-a", "@pass-b"),
        workload="turbo-1024x512",
        tiny_workload="turbo-tiny-wide",
        prompts="vllm-3x1",
    )

    def __init__(self, settings: Settings) -> None:
        """Raises `UnsupportedError` for settings that name no vLLM-Omni, or two."""
        command, self._url = settings.vllm_omni_command, settings.vllm_omni_url
        check_way(
            "--zimage-vllm-omni",
            starting={
                "--zimage-vllm-omni-command": command if command != _COMMAND else "",
                "--zimage-vllm-omni-flags": settings.vllm_omni_flags,
            },
            url=self._url,
            pid=settings.vllm_omni_pid,
        )
        if self._url is None and shutil.which(Path(command).expanduser()) is None:
            raise UnsupportedError(
                f"the vllm-omni engine has no vLLM-Omni to draw with: {command} is no command here",
                mend="name its executable, --zimage-vllm-omni-command=FILE, or one that runs already,"
                " --zimage-vllm-omni-url=URL",
            )
        self._settings = settings
        self.attached_pid = settings.vllm_omni_pid

    @property
    def way(self) -> str:
        if self._url:
            return f"attaches to the one at {self._url}"
        return f"starts {self._settings.vllm_omni_command} serve for every run"

    def refuse(self, variant: Variant, workload: Workload) -> None:
        launch.check_variant(variant)
        versions.check_workload(workload)

    def refuse_choice(self, variants: Sequence[Variant]) -> None:
        if self._url is not None and len(variants) > 1:
            names = ", ".join([*(variant.name for variant in variants[:3]), *(["..."] if len(variants) > 3 else [])])
            raise UnsupportedError(
                f"vLLM-Omni at {self._url} serves one variant, and this session is of {len(variants)}: {names}",
                mend="name the one that it serves: --zimage-config=NAME",
            )

    def reads(self, variant: Variant, model_set: str) -> str:
        if self._url:
            return "the model that the server has loaded"
        launch.check_variant(variant)
        model = pipeline.model_of(variant, model_set, self._root())
        folder = pipeline.folder_of(model)
        return f"{model}: {f'found: {folder}' if folder is not None else 'fetched by the server when it starts'}"

    def run(self, plan: RunPlan, progress: ReportProgress) -> RunRecord:
        plan = self._with_own_files(plan)
        record = super().run(plan, progress)
        cold = record.cold
        if not plan.files and not cold.unavailable:
            why = f"{self.name} may have fetched its files while it started: they were not found on this host before"
            cold = structs.replace(cold, unavailable=why)
        # A part that not every round has would be compared between different sets of rounds.
        return structs.replace(record, cold=cold, rounds=metrics.same_phases(record.rounds))

    @contextmanager
    def open(self, plan: RunPlan, progress: ReportProgress) -> Iterator[VllmOmniSession]:
        """Raises `UnsupportedError` for a variant, a workload or a version that would draw something else."""
        from pytest_zimage.engines.vllm_omni.opening import attached, started

        settings, variant = self._settings, plan.variant
        self.refuse(variant, plan.workload)
        if self._url is None:
            model = pipeline.model_of(variant, plan.model_set, self._root())
            opened = started(settings.vllm_omni_command, settings.vllm_omni_flags, model, plan, progress)
        else:
            opened = attached(self._url, self.attached_pid, plan, progress)
        with opened as session:
            if self._url is not None:
                _only_one(plan, self._url)
            yield session

    def _with_own_files(self, plan: RunPlan) -> RunPlan:
        """The plan with the files that the server reads, instead of the single ones that it does not."""
        launch.check_variant(plan.variant)
        environment = {key: value for key, value in plan.environment.items() if not key.startswith("weights.")}
        files: dict[Role, Path] = {}
        if self._url is None:
            folder = pipeline.folder_of(pipeline.model_of(plan.variant, plan.model_set, self._root()))
            files = pipeline.networks(folder) if folder is not None else {}
        environment |= {f"weights.{role}": file_fingerprint(path)[:16] for role, path in files.items()}
        return replace(plan, files=files, environment=environment)

    def _root(self) -> Path | None:
        """The model set's folder, in which whole pipelines may lie."""
        named, kept = Path(self._settings.models), self._settings.cache / self._settings.models
        return next((folder for folder in (named, kept) if folder.is_dir()), None)


def _only_one(plan: RunPlan, url: str) -> None:
    """Raises `UnsupportedError` if the server at `url` was another variant before in this session, of which xdist makes
    several processes with one folder."""
    mark = plan.log.parent / "vllm-omni-attached"
    mark.parent.mkdir(parents=True, exist_ok=True)
    # A link is there as a whole or not at all, and to whom it points is all there is to say.
    with suppress(FileExistsError):
        mark.symlink_to(plan.variant.name)
    if (first := mark.readlink().name) != plan.variant.name:
        raise UnsupportedError(
            f"vLLM-Omni at {url} was measured as {first} in this session: it cannot be {plan.variant.name} too",
            mend=f"name the one variant that it serves: --zimage-config={first}",
        )
