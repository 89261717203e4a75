"""Why a prompt was refused, as sentences: the types of error that ComfyUI documents, each with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_zimage.engines.comfyui.messages import NodeErrors, Problem
from pytest_zimage.engines.comfyui.slots import Graph
from pytest_zimage.errors import EngineError

_PROMPT = {
    "no_prompt": ("it found no prompt in the request", "check that nothing between here and the server changes it"),
    "invalid_prompt": ("it cannot read the workflow", "check --zimage-comfyui-workflow, and that its nodes are known"),
    "missing_node_type": ("it lacks a node that the workflow has", "update it, or install the custom node"),
    "prompt_no_outputs": ("the workflow has no node that writes an image", "add a SaveImage node"),
    "prompt_outputs_failed_validation": (
        "its nodes do not pass the checks",
        "see the nodes above",
    ),
    "invalid_prompt_id": ("it does not take the prompt's id", "update pytest-zimage: the form of ids has changed"),
}
_NODE = {
    "value_not_in_list": "the server does not know this value",
    "invalid_input_type": "is of another type than the node takes",
    "required_input_missing": "is required, and missing",
    "return_type_mismatch": "is linked to an output of another type",
    "bad_linked_input": "is linked to nothing that exists",
    "dependency_cycle": "the links run in a circle",
    "custom_validation_failed": "the node itself refuses it",
    "exception_during_validation": "the server's check of it failed",
    "exception_during_inner_validation": "the server's check of what it is linked to failed",
    "value_smaller_than_min": "is too small",
    "value_bigger_than_max": "is too large",
}


def refusal(what: str, graph: Graph, error: Problem | None, node_errors: Mapping[str, NodeErrors]) -> EngineError:
    """The error of a refused prompt, or of one that was taken without some of its outputs (`error` None)."""
    said, mend = _PROMPT.get(error.type, (f"{error.type}: {error.message}", "")) if error else _TAKEN
    lines = [f"{what}: refuses the workflow: {said}" if error else f"{what}: {said}"]
    if error and not node_errors:
        detail = " ".join(part for part in (error.message, error.details) if part)
        lines.append(f"    {detail}")
    for id, node in node_errors.items():
        lines += [f"    node {id} ({node.class_type or _class(graph, id)}): {_sentence(one)}" for one in node.errors]
    kinds = {one.type for node in node_errors.values() for one in node.errors}
    if "value_not_in_list" in kinds:
        mend = "a file: put it into the server's folders, and refresh its list; another value: update the server"
    return EngineError("\n".join(lines), mend=mend)


_TAKEN = (
    "took the workflow, and leaves out outputs whose nodes do not pass its checks",
    "see the nodes above",
)


def _sentence(problem: Problem) -> str:
    name = problem.extra_info.get("input_name")
    where = f"input {name!r}: " if isinstance(name, str) else ""
    reason = _NODE.get(problem.type, f"{problem.type}: {problem.message}")
    return f"{where}{reason} ({problem.details})" if problem.details and problem.details != name else where + reason


def _class(graph: Graph, id: str) -> str:
    return str(graph.get(id, {}).get("class_type", "unknown class"))
