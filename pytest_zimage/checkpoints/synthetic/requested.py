"""Every file a synthetic set can have: those of the default variants, and those written only when one is named."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from pytest_zimage.catalog.model import ROLE_FOLDERS, ModelDims, Role
from pytest_zimage.checkpoints.folders import CONFIG
from pytest_zimage.checkpoints.synthetic import more_files, policies
from pytest_zimage.checkpoints.synthetic.plan import FILE_NAMES, FilePlan, name_of, plan_files, transformer_shapes
from pytest_zimage.errors import CatalogError

REQUESTED: dict[Role, tuple[str, ...]] = {
    **more_files.NAMES,
    "transformer": (*policies.FOLDERS, *more_files.NAMES["transformer"]),
}
"""Names, as a variant has them, of files and folders that are not written by default."""


def first_paths(names: Iterable[str] | None) -> list[str]:
    """For each of `names` (None: the default ones) the path in the set that is there once it was written.

    Of a folder that is its config. Raises `CatalogError` for a name that no set has.
    """
    known = {
        name: str(PurePosixPath(ROLE_FOLDERS[role][0]) / name / (CONFIG if name.endswith("/") else ""))
        for table in (FILE_NAMES, REQUESTED)
        for role, file_names in table.items()
        for name in file_names
    }
    default = [name for file_names in FILE_NAMES.values() for name in file_names]
    wanted = list(dict.fromkeys(default if names is None else names))
    for name in wanted:
        if name not in known:
            raise CatalogError(f"the synthetic model sets have no file {name!r}", mend=f"they have: {', '.join(known)}")
    return [known[name] for name in wanted]


def plan_set(dims: ModelDims, names: Iterable[str] | None) -> list[FilePlan]:
    """The plans of `names` (None: the default ones) of a set of these dimensions; raises as `first_paths`."""
    wanted = None if names is None else set(names)
    first_paths(wanted)
    plans = [plan for plan in plan_files(dims) if wanted is None or name_of(plan.path) in wanted]
    requested = [name for names_ in REQUESTED.values() for name in names_ if name in (wanted or ())]
    if requested:
        shapes = transformer_shapes(dims)
        for name in requested:
            plans += (
                policies.plan_folder(name, shapes, dims)
                if name in policies.FOLDERS
                else [more_files.plan_file(name, shapes)]
            )
    return plans
