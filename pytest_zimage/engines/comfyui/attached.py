"""A ComfyUI that runs already: whether it has the variant's files, and under which names."""

from __future__ import annotations

import re

from pytest_zimage.catalog import ROLE_FOLDERS, Role, Variant
from pytest_zimage.engines.comfyui.api import ComfyUIApi
from pytest_zimage.engines.comfyui.workflow import Workflow
from pytest_zimage.errors import MissingFileError

_SLOTS: dict[Role, str] = {"transformer": "transformer", "text_encoder": "text encoder", "vae": "vae", "lora": "lora"}
_SHOWN = 12


def listed_files(what: str, api: ComfyUIApi, workflow: Workflow, variant: Variant) -> dict[Role, str]:
    """The server's own names of the variant's files: the same, or the same below one of its folders.

    Raises `MissingFileError`, naming every file that it does not list, or lists twice.
    """
    names: dict[Role, str] = {}
    problems: list[str] = []
    for role, file in variant.files().items():
        place = workflow.places[_SLOTS[role]][0]
        kind = workflow.nodes[place.node]["class_type"]
        choices = api.choices(kind, place.input)
        found = [name for name in choices if name == file] or [
            name for name in choices if re.split(r"[/\\]", name)[-1] == file
        ]
        if len(found) == 1:
            names[role] = found[0]
            continue
        listed = ", ".join(choices[:_SHOWN]) + (", ..." if len(choices) > _SHOWN else "")
        has = f"has it more than once: {', '.join(found)}" if found else f"lists {listed or 'none'}"
        problems.append(f"\n    {file} (models/{ROLE_FOLDERS[role][0]}): {kind} {has}")
    if problems:
        raise MissingFileError(
            f"{what}: not all files of {variant.name} are there once:{''.join(problems)}",
            mend="put them into its model folders under these names, and start it anew",
        )
    return names
