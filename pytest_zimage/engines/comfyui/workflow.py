"""What a server is asked to do: a workflow, and the variant and the workload written into its places."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pytest_zimage.catalog import Role, Variant, Workload
from pytest_zimage.engines.comfyui.slots import LOADERS, SAMPLERS, SLOTS, Graph, Place, title
from pytest_zimage.engines.comfyui.template import published
from pytest_zimage.errors import UnsupportedError

SAVE_PHASE = "save_image"
_PHASES = {
    "UNETLoader": "load_transformer",
    "CLIPLoader": "load_text_encoder",
    "VAELoader": "load_vae",
    "LoraLoaderModelOnly": "load_lora",
    "ModelSamplingAuraFlow": "shift",
    "CLIPTextEncode": "text_encode",
    "ConditioningZeroOut": "negative",
    "EmptySD3LatentImage": "latent",
    "KSampler": "sampler",
    "VAEDecode": "vae_decode",
    "SaveImage": SAVE_PHASE,
}


class _Node(msgspec.Struct):
    class_type: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Workflow:
    """A graph, and the place in it of each thing that varies."""

    nodes: Graph
    places: Mapping[str, tuple[Place, ...]]
    """By the name of the slot; empty where this graph has none and needs none."""
    phases: Mapping[str, str]
    """What each node is called among the phases of an image, by its id."""
    sampler: str
    """Id of the node that must compute anew for every image."""
    save: str
    """Id of the node that writes the image."""
    identity: str
    """`published`, or the start of the SHA-256 of one's own."""

    @property
    def loaders(self) -> frozenset[str]:
        """Ids of the nodes that read the weights: not in the cache before the first image, always in it later."""
        return frozenset(place.node for name in LOADERS for place in self.places[name])

    def told(self, id: str) -> str:
        """A node's name for a person."""
        return f"node {id} ({self.nodes.get(id, {}).get('class_type', 'unknown')})"

    def graph(self, variant: Variant, workload: Workload, files: Mapping[Role, str], prefix: str) -> Graph:
        """What to ask for one image: `files` as the server lists them, and the prefix of the name it is saved under."""
        values: dict[str, Any] = {
            "transformer": files["transformer"],
            "weight dtype": variant.weight_dtype,
            "text encoder": files["text_encoder"],
            "vae": files["vae"],
            "shift": workload.shift,
            "prompt": workload.prompt,
            "width": workload.width,
            "height": workload.height,
            "seed": workload.seed,
            "steps": workload.steps,
            # ComfyUI's CFG 1 leaves the negative prompt out, as diffusers' guidance 0.
            "cfg": workload.guidance + 1.0,
            "sampler name": workload.sampler,
            "scheduler": workload.schedule,
            "prefix": prefix,
        }
        if workload.guidance > 0:
            values["negative prompt"] = workload.negative_prompt
        if variant.lora:
            values |= {"lora": files["lora"], "lora strength": variant.lora_strength}
        graph = copy.deepcopy(self.nodes)
        for name, value in values.items():
            for place in self.places[name]:
                graph[place.node]["inputs"][place.input] = value
        return graph


def build_workflow(variant: Variant, workload: Workload, own: Path | None) -> Workflow:
    """The published workflow, or one's `own` from a file in API format.

    Raises `UnsupportedError` for a file that is none, and for one in which something has no place.
    """
    if own is None:
        nodes, identity = published(guided=workload.guidance > 0, lora=bool(variant.lora)), "published"
    else:
        data = _read(own)
        nodes, identity = _parse(own, data), hashlib.sha256(data).hexdigest()[:16]
    what = f"workflow {own or identity}"
    places = {slot.name: slot.find(nodes) for slot in SLOTS}
    missing = [slot for slot in SLOTS if not places[slot.name] and slot.needed(variant, workload)]
    if missing:
        lines = "".join(f"\n    {slot.name}: {slot.told(nodes)}" for slot in missing)
        raise UnsupportedError(
            f"{what} has no place for what {variant.name} and {workload.name} ask for; missing:{lines}",
            mend="give the node that title in the editor, and export it anew: Workflow > Export (API)",
        )
    return Workflow(nodes, places, _phase_names(nodes), _sampler(nodes, what), places["prefix"][0].node, identity)


def _read(own: Path) -> bytes:
    try:
        return own.read_bytes()
    except OSError as error:
        raise UnsupportedError(
            f"workflow {own}: cannot be read: {error.strerror}", mend="check --zimage-comfyui-workflow"
        ) from error


def _parse(own: Path, data: bytes) -> Graph:
    export = "export it from the editor: Workflow > Export (API)"
    try:
        nodes: Any = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise UnsupportedError(f"workflow {own}: no JSON: {error}", mend=export) from error
    if isinstance(nodes, dict) and isinstance(nodes.get("nodes"), list):
        raise UnsupportedError(f"workflow {own}: is in the editor's own format, which servers do not take", mend=export)
    try:
        msgspec.convert(nodes, dict[str, _Node])
    except msgspec.ValidationError as error:
        raise UnsupportedError(f"workflow {own}: is not in the API format: {error}", mend=export) from error
    graph: Graph = nodes
    return graph


def _phase_names(nodes: Graph) -> dict[str, str]:
    """Two nodes of one class get their ids behind the name."""
    names = {id: _PHASES.get(node["class_type"]) or str(node["class_type"]) for id, node in nodes.items()}
    count = Counter(names.values())
    return {id: name if count[name] == 1 else f"{name}_{id}" for id, name in names.items()}


def _sampler(nodes: Graph, what: str) -> str:
    titled = [id for id, node in nodes.items() if title(node) == "sampler"]
    found = titled or [id for id, node in nodes.items() if node["class_type"] in SAMPLERS]
    if len(found) != 1:
        raise UnsupportedError(
            f"{what}: nodes that could be the sampler: {', '.join(found) or 'none'}; one must be, to see that the"
            " cache does not serve it",
            mend="give the node that draws the title 'sampler'",
        )
    return found[0]
