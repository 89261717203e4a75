"""The node classes that the stand-in knows, how a graph of them is checked, and what makes two nodes the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FILES = {"unet_name": "diffusion_models", "clip_name": "text_encoders", "vae_name": "vae", "lora_name": "loras"}
_SAMPLERS, _SCHEDULERS = ["euler", "res_multistep"], ["simple", "normal"]
_DTYPES = ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]


@dataclass(frozen=True)
class Kind:
    """A node class: its inputs by type (a list is a choice), the type it gives, and whether it is an output."""

    inputs: dict[str, Any]
    gives: str | None
    output: bool = False


KINDS = {
    "UNETLoader": Kind({"unet_name": [], "weight_dtype": _DTYPES}, "MODEL"),
    "CLIPLoader": Kind({"clip_name": [], "type": ["lumina2", "sd3"]}, "CLIP"),
    "VAELoader": Kind({"vae_name": []}, "VAE"),
    "LoraLoaderModelOnly": Kind({"model": "MODEL", "lora_name": [], "strength_model": "FLOAT"}, "MODEL"),
    "ModelSamplingAuraFlow": Kind({"model": "MODEL", "shift": "FLOAT"}, "MODEL"),
    "CLIPTextEncode": Kind({"clip": "CLIP", "text": "STRING"}, "CONDITIONING"),
    "ConditioningZeroOut": Kind({"conditioning": "CONDITIONING"}, "CONDITIONING"),
    "EmptySD3LatentImage": Kind({"width": "INT", "height": "INT", "batch_size": "INT"}, "LATENT"),
    "PrimitiveInt": Kind({"value": "INT"}, "INT"),
    "KSampler": Kind(
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "seed": "INT",
            "steps": "INT",
            "cfg": "FLOAT",
            "sampler_name": _SAMPLERS,
            "scheduler": _SCHEDULERS,
            "denoise": "FLOAT",
        },
        "LATENT",
    ),
    "VAEDecode": Kind({"samples": "LATENT", "vae": "VAE"}, "IMAGE"),
    "SaveImage": Kind({"images": "IMAGE", "filename_prefix": "STRING"}, None, output=True),
    "PreviewImage": Kind({"images": "IMAGE"}, None, output=True),
}

Graph = dict[str, dict[str, Any]]


def problem(kind: str, message: str, details: str = "", **info: Any) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": info}


def check_graph(graph: Graph, files: dict[str, list[str]]) -> tuple[dict[str, Any] | None, dict[str, Any], list[str]]:
    """The error of the whole prompt, errors by node, and the outputs that can run."""
    for id, node in graph.items():
        if node.get("class_type") not in KINDS:
            said = f"Cannot execute because node {node.get('class_type')} does not exist."
            return problem("missing_node_type", said, f"Node ID '#{id}'"), {}, []
    outputs = [id for id, node in graph.items() if KINDS[node["class_type"]].output]
    if not outputs:
        return problem("prompt_no_outputs", "Prompt has no outputs"), {}, []
    found = {id: errors for id in graph if (errors := _check_node(graph, id, files))}
    good = [id for id in outputs if not found.keys() & _upstream(graph, id)]
    told = {
        id: {"errors": errors, "dependent_outputs": outputs, "class_type": graph[id]["class_type"]}
        for id, errors in found.items()
    }
    if not good:
        lines = "\n".join(f"{one['message']}: {one['details']}" for errors in found.values() for one in errors)
        error = problem("prompt_outputs_failed_validation", "Prompt outputs failed validation", lines)
        return error, told, []
    return None, told, good


def order(graph: Graph, outputs: list[str]) -> list[str]:
    """Ids of all nodes that the outputs need, each after those that it needs."""
    found: list[str] = []

    def visit(id: str) -> None:
        for value in graph[id]["inputs"].values():
            if isinstance(value, list):
                visit(value[0])
        if id not in found:
            found.append(id)

    for id in outputs:
        visit(id)
    return found


def signature(graph: Graph, id: str) -> str:
    """The same for nodes of one class with the same inputs, all the way up."""
    inputs = {
        name: signature(graph, value[0]) if isinstance(value, list) else value
        for name, value in sorted(graph[id]["inputs"].items())
    }
    return f"{graph[id]['class_type']}({inputs})"


def _upstream(graph: Graph, id: str) -> set[str]:
    return set(order(graph, [id]))


def _check_node(graph: Graph, id: str, files: dict[str, list[str]]) -> list[dict[str, Any]]:
    errors = []
    inputs = graph[id]["inputs"]
    for name, wanted in KINDS[graph[id]["class_type"]].inputs.items():
        if name not in inputs:
            errors.append(problem("required_input_missing", "Required input is missing", name, input_name=name))
            continue
        value = inputs[name]
        if isinstance(value, list):
            given = KINDS[graph[value[0]]["class_type"]].gives
            if given != wanted:
                said = f"{name}, received_type({given}) mismatch input_type({wanted})"
                error = problem("return_type_mismatch", "Return type mismatch", said, input_name=name)
                errors.append(error)
        elif isinstance(wanted, list):
            choices = files[FILES[name]] if name in FILES else wanted
            if value not in choices:
                said = f"{name}: '{value}' not in {choices}"
                errors.append(problem("value_not_in_list", "Value not in list", said, input_name=name))
        elif wanted == "INT" and not isinstance(value, int):
            said = f"{name}, {value}, invalid literal for int()"
            errors.append(problem("invalid_input_type", "Failed to convert to INT", said, input_name=name))
        elif name in ("width", "steps") and value < 1:
            said = f"Value {value} smaller than min of 1"
            errors.append(problem("value_smaller_than_min", said, name, input_name=name))
    return errors
