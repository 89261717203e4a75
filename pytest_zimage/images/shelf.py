"""The images that quality is judged on: which are drawn, where they are kept, and when earlier ones may be used again.

They lie under `.zimage/images/<variant>-<build>/`. The build covers everything that may change a pixel: packages,
device and machine, weights, the variant's own table, size, prompts, and the code that draws. An image of another build
is never used.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from msgspec import Struct, json, structs

import pytest_zimage
from pytest_zimage.catalog import Prompt, PromptSet, Variant, Workload
from pytest_zimage.engines.protocol import DrawImages, DrawnImage, ImageJob
from pytest_zimage.verdict.paired import pair_name

_PACKAGES = ("torch", "diffusers", "transformers", "comfy-kitchen", "accelerate", "tokenizers")
_DECIDES = (*_PACKAGES, "device", "machine", "cpu", "engine")
_DRAWING_CODE = ("checkpoints", "engines")
_INDEX = "index.json"


class Shelf(Struct, frozen=True):
    """One variant's images of one build."""

    folder: Path
    width: int
    height: int

    def request(self, pairs: Iterable[tuple[Prompt, int]]) -> DrawImages:
        """What to ask of an engine so that these images come to lie here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = tuple(
            ImageJob(prompt.name, prompt.text, seed, str(self.folder / f"{prompt.name}-{seed}.png"))
            for prompt, seed in pairs
        )
        return DrawImages(jobs=jobs, width=self.width, height=self.height)

    def keep(self, images: Iterable[DrawnImage]) -> None:
        """Note fingerprints, so that a later session may take these images instead of drawing them."""
        before = self._index()
        known = {pair_name(image.prompt, image.seed): image for image in (*before, *images)}
        if list(known.values()) == before:
            return
        # Two xdist workers may note the same images at once: each writes a file of its own, and either one will do.
        temporary = self.folder / f".{_INDEX}.{os.getpid()}.tmp"
        temporary.write_bytes(json.format(json.encode(list(known.values())), indent=1))
        temporary.replace(self.folder / _INDEX)

    def find(self, pairs: Iterable[tuple[Prompt, int]]) -> tuple[DrawnImage, ...] | None:
        """All of these images from an earlier session, or None if one is not there."""
        known = {(image.prompt, image.seed): image for image in self._index() if Path(image.path).is_file()}
        wanted = [(prompt.name, seed) for prompt, seed in pairs]
        return tuple(known[pair] for pair in wanted) if all(pair in known for pair in wanted) else None

    def _index(self) -> list[DrawnImage]:
        path = self.folder / _INDEX
        return json.decode(path.read_bytes(), type=list[DrawnImage]) if path.is_file() else []


def image_size(prompts: PromptSet, workload: Workload) -> tuple[int, int]:
    """Width and height of an image of `prompts`, which may leave them to the workload."""
    return prompts.width or workload.width, prompts.height or workload.height


def open_shelf(
    images: Path,
    variant: Variant,
    prompts: PromptSet,
    workload: Workload,
    environment: Mapping[str, str],
    fault: str,
) -> Shelf:
    """The shelf of `variant` in this build.

    `environment` holds packages, device, weights and engine; `fault` is what is injected.
    """
    width, height = image_size(prompts, workload)
    decides = {key: value for key, value in environment.items() if key in _DECIDES or key.startswith("weights.")}
    said = structs.replace(workload, prompt="", seed=0, title="", width=width, height=height)
    texts = {prompt.name: prompt.text for prompt in prompts.prompts}
    digest = hashlib.sha256(json.encode([decides, variant, said, texts, fault, drawing_code()], order="sorted"))
    return Shelf(images / f"{variant.name}-{digest.hexdigest()[:12]}", width, height)


@cache
def drawing_code() -> str:
    """Hash of the modules that decide what is drawn; a commit alone would miss uncommitted work."""
    package = Path(pytest_zimage.__file__).parent
    digest = hashlib.sha256()
    for folder in _DRAWING_CODE:
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
