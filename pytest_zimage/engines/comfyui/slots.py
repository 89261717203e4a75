"""Where in a workflow each thing that varies is written: by the node's title, or by its class if there is only one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_zimage.catalog import Variant, Workload

Graph = dict[str, dict[str, Any]]
"""Nodes by id, ComfyUI's API format: `{"class_type": ..., "inputs": {...}, "_meta": {"title": ...}}`."""

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
_LATENTS = ("EmptySD3LatentImage", "EmptyLatentImage", "EmptyFlux2LatentImage")

Needed = Callable[[Variant, Workload], bool]


@dataclass(frozen=True)
class Place:
    """An input of a node."""

    node: str
    input: str


@dataclass(frozen=True)
class Slot:
    """One thing that varies, and how its place is found."""

    name: str
    inputs: tuple[str, ...]
    """Names that the input may have."""
    titles: tuple[str, ...]
    """Titles of the node, in the order in which they are looked for."""
    classes: tuple[str, ...]
    """Looked for where no node has a title: it must be the only one with such an input."""
    needed: Needed = lambda variant, workload: True

    def find(self, nodes: Graph) -> tuple[Place, ...]:
        """Its place; empty where there is none, or more than one that could be meant."""
        for wanted in self.titles:
            if places := self._among({id: node for id, node in nodes.items() if title(node) == wanted}):
                return places[:1] if len(places) == 1 else ()
        places = self._among({id: node for id, node in nodes.items() if node["class_type"] in self.classes})
        return places if len(places) == 1 else ()

    def told(self, nodes: Graph) -> str:
        """What would be such a place, and what was found instead."""
        could = self._among({id: node for id, node in nodes.items() if node["class_type"] in self.classes})
        wish = f"a node titled {_either(self.titles)} with the input {_either(self.inputs)}, not linked to another node"
        if len(could) > 1:
            return f"{wish}; nodes {', '.join(place.node for place in could)} could all be meant"
        return f"{wish}; or one node of the class {_either(self.classes)}" if self.classes else wish

    def _among(self, nodes: Graph) -> tuple[Place, ...]:
        found = []
        for id, node in nodes.items():
            # A list is a link to another node, whose value would be overwritten here only.
            names = [
                name for name in self.inputs if name in node["inputs"] and not isinstance(node["inputs"][name], list)
            ]
            found += [Place(id, name) for name in names[:1]]
        return tuple(found)


def title(node: Mapping[str, Any]) -> str:
    """The owner's name of a node, in small letters and single spaces; empty without one."""
    meta = node.get("_meta")
    text = meta.get("title", "") if isinstance(meta, dict) else ""
    return " ".join(str(text).replace("_", " ").lower().split())


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(f"'{name}'" for name in names)


def _guided(variant: Variant, workload: Workload) -> bool:
    return workload.guidance > 0


def _with_lora(variant: Variant, workload: Workload) -> bool:
    return bool(variant.lora)


def _never(variant: Variant, workload: Workload) -> bool:
    return False


_SAMPLER = ("sampler",)
_LORAS = ("LoraLoaderModelOnly", "LoraLoader")

SLOTS: tuple[Slot, ...] = (
    Slot("transformer", ("unet_name",), ("transformer",), ("UNETLoader", "UnetLoaderGGUF")),
    Slot(
        "weight dtype",
        ("weight_dtype",),
        ("transformer",),
        ("UNETLoader",),
        lambda variant, workload: variant.weight_dtype != "default",
    ),
    Slot("text encoder", ("clip_name",), ("text encoder",), ("CLIPLoader", "CLIPLoaderGGUF")),
    Slot("vae", ("vae_name",), ("vae",), ("VAELoader",)),
    Slot("lora", ("lora_name",), ("lora",), _LORAS, _with_lora),
    Slot("lora strength", ("strength_model",), ("lora",), _LORAS, _with_lora),
    Slot("shift", ("shift",), ("shift",), ("ModelSamplingAuraFlow",), _never),
    Slot("prompt", ("text", "value"), ("prompt", "clip text encode (positive prompt)"), ("CLIPTextEncode",)),
    Slot("negative prompt", ("text", "value"), ("negative prompt", "clip text encode (negative prompt)"), (), _guided),
    Slot("width", ("width",), ("latent", "size"), _LATENTS),
    Slot("height", ("height",), ("latent", "size"), _LATENTS),
    Slot("seed", ("seed", "noise_seed", "value"), ("seed", *_SAMPLER), (*SAMPLERS, "RandomNoise")),
    Slot("steps", ("steps", "value"), ("steps", *_SAMPLER), (*SAMPLERS, "BasicScheduler")),
    Slot("cfg", ("cfg", "value"), ("cfg", *_SAMPLER), (*SAMPLERS, "CFGGuider"), _guided),
    Slot("sampler name", ("sampler_name",), ("sampler name", *_SAMPLER), (*SAMPLERS, "KSamplerSelect")),
    Slot("scheduler", ("scheduler",), ("scheduler", *_SAMPLER), (*SAMPLERS, "BasicScheduler")),
    Slot("prefix", ("filename_prefix",), ("save",), ("SaveImage",)),
)
LOADERS = ("transformer", "text encoder", "vae")
