"""What the comfyui engine asks for: the published workflow, one's own, and what it refuses to draw."""

from __future__ import annotations

import json

import msgspec
import pytest
from standins.comfyui_plan import CATALOG, variant, workload

from pytest_zimage.engines.comfyui.messages import NodeInfo
from pytest_zimage.engines.comfyui.support import needed_flags, refuse_missing_flags, refuse_unsupported
from pytest_zimage.engines.comfyui.template import published
from pytest_zimage.engines.comfyui.workflow import build_workflow
from pytest_zimage.errors import UnsupportedError

FILES = {
    "transformer": "t.safetensors",
    "text_encoder": "q.safetensors",
    "vae": "v.safetensors",
    "lora": "l.safetensors",
}


def graph(chosen=None, drawn=None, own=None):
    chosen, drawn = chosen or variant(), drawn or workload()
    return build_workflow(chosen, drawn, own).graph(chosen, drawn, FILES, "folder/name")


def inputs(nodes, kind):
    """Of the one node of a class."""
    [node] = [node for node in nodes.values() if node["class_type"] == kind]
    return node["inputs"]


# ---- the published workflow ------------------------------------------------------


def test_it_has_the_published_nodes_and_the_values_of_the_workload():
    nodes = graph(drawn=workload("turbo-1024"))
    assert sorted(node["class_type"] for node in nodes.values()) == [
        "CLIPLoader",
        "CLIPTextEncode",
        "ConditioningZeroOut",
        "EmptySD3LatentImage",
        "KSampler",
        "ModelSamplingAuraFlow",
        "SaveImage",
        "UNETLoader",
        "VAEDecode",
        "VAELoader",
    ]
    assert inputs(nodes, "UNETLoader") == {"unet_name": "t.safetensors", "weight_dtype": "default"}
    assert inputs(nodes, "CLIPLoader") == {"clip_name": "q.safetensors", "type": "lumina2"}
    assert inputs(nodes, "ModelSamplingAuraFlow")["shift"] == 3.0
    assert inputs(nodes, "EmptySD3LatentImage") == {"width": 1024, "height": 1024, "batch_size": 1}
    assert inputs(nodes, "SaveImage")["filename_prefix"] == "folder/name"
    sampler = {name: value for name, value in inputs(nodes, "KSampler").items() if not isinstance(value, list)}
    assert sampler == {
        "seed": 42,
        "steps": 8,
        "cfg": 1.0,
        "sampler_name": "res_multistep",
        "scheduler": "simple",
        "denoise": 1.0,
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", "default"), ("fp8-cast", "fp8_e4m3fn"), ("fp8-cast-fast", "fp8_e4m3fn_fast"), ("nvfp4", "default")],
)
def test_the_weight_dtype_is_the_variants(name, dtype):
    assert inputs(graph(variant(name)), "UNETLoader")["weight_dtype"] == dtype


def test_guidance_encodes_the_negative_prompt_and_is_one_less_than_cfg():
    nodes = graph(drawn=workload("base-tiny"))
    sampler = inputs(nodes, "KSampler")
    assert sampler["cfg"] == 5.0
    assert nodes[sampler["positive"][0]]["inputs"]["text"] == workload("base-tiny").prompt
    assert nodes[sampler["negative"][0]]["inputs"]["text"] == workload("base-tiny").negative_prompt
    assert "ConditioningZeroOut" not in {node["class_type"] for node in nodes.values()}


def test_a_lora_stands_between_the_transformer_and_its_shift():
    nodes = graph(variant("nvfp4-mixed-lora", lora_strength=0.5))
    lora = nodes[inputs(nodes, "ModelSamplingAuraFlow")["model"][0]]
    assert lora["inputs"] == {"model": ["1", 0], "lora_name": "l.safetensors", "strength_model": 0.5}
    assert nodes["1"]["class_type"] == "UNETLoader"


def test_every_link_leads_to_a_node():
    for guided in (False, True):
        for lora in (False, True):
            nodes = published(guided=guided, lora=lora)
            links = [
                value[0] for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)
            ]
            assert set(links) <= set(nodes)


def test_asking_twice_leaves_the_first_graph_as_it_was():
    ready = build_workflow(variant(), workload(), None)
    first = ready.graph(variant(), workload(seed=1), FILES, "a/a")
    ready.graph(variant(), workload(seed=2), FILES, "a/b")
    assert inputs(first, "KSampler")["seed"] == 1


# ---- one's own workflow -----------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def _write(nodes) -> object:
        path = tmp_path / "mine.json"
        path.write_text(nodes if isinstance(nodes, str) else json.dumps(nodes))
        return path

    return _write


def nameless(**changed):
    """The published graph as an editor exports it that nobody has given titles in; `changed` are nodes by id."""
    nodes = published(guided=False, lora=False)
    for node in nodes.values():
        del node["_meta"]
    return {**nodes, **changed}


CUSTOM = {
    "8": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {"noise": ["20", 0], "guider": ["21", 0], "sampler": ["22", 0], "sigmas": ["23", 0]},
    },
    "20": {"class_type": "RandomNoise", "inputs": {"noise_seed": 0}},
    "21": {"class_type": "CFGGuider", "inputs": {"model": ["4", 0], "cfg": 1.0}},
    "22": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "23": {
        "class_type": "BasicScheduler",
        "inputs": {"model": ["4", 0], "scheduler": "simple", "steps": 4, "denoise": 1},
    },
}


def test_nodes_without_titles_are_found_where_there_is_one_of_a_class(write):
    drawn = workload(seed=7, steps=3)
    nodes = graph(drawn=drawn, own=write(nameless()))
    assert (inputs(nodes, "KSampler")["seed"], inputs(nodes, "KSampler")["steps"]) == (7, 3)
    assert inputs(nodes, "CLIPTextEncode")["text"] == drawn.prompt
    assert inputs(nodes, "SaveImage")["filename_prefix"] == "folder/name"


def test_a_graph_of_custom_sampling_is_filled_in_too(write):
    own = write(nameless(**CUSTOM))
    nodes = graph(drawn=workload(seed=7, steps=3, sampler="res_multistep"), own=own)
    assert nodes["20"]["inputs"]["noise_seed"] == 7
    assert nodes["22"]["inputs"]["sampler_name"] == "res_multistep"
    assert nodes["23"]["inputs"]["steps"] == 3
    ready = build_workflow(variant(), workload(), own)
    assert ready.sampler == "8"
    assert ready.loaders == {"1", "2", "3"}
    assert len(ready.identity) == 16


def test_of_two_nodes_the_one_with_the_title_counts(write):
    second = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": "style"}}
    nodes = nameless(**{"30": second})
    with pytest.raises(UnsupportedError) as caught:
        graph(own=write(nodes))
    assert "prompt: a node titled 'prompt'" in caught.value.message
    assert "nodes 5, 30 could all be meant" in caught.value.message
    nodes["5"]["_meta"] = {"title": " The_Prompt ".replace("The_", "")}
    filled = graph(own=write(nodes))
    assert filled["5"]["inputs"]["text"] == workload().prompt
    assert filled["30"]["inputs"]["text"] == "style"


def test_a_linked_seed_is_no_place_until_its_source_is_named(write):
    nodes = nameless(**{"40": {"class_type": "PrimitiveInt", "inputs": {"value": 1}}})
    nodes["8"]["inputs"]["seed"] = ["40", 0]
    with pytest.raises(UnsupportedError) as caught:
        graph(own=write(nodes))
    message = caught.value.message
    assert "mine.json has no place for what bf16 and turbo-tiny ask for" in message
    assert "\n    seed: a node titled 'seed' or 'sampler' with the input 'seed' or 'noise_seed' or 'value'" in message
    assert "steps:" not in message
    nodes["40"]["_meta"] = {"title": "Seed"}
    assert graph(drawn=workload(seed=9), own=write(nodes))["40"]["inputs"]["value"] == 9


def test_every_missing_place_is_named_at_once(write):
    nodes = nameless()
    del nodes["10"], nodes["3"]
    with pytest.raises(UnsupportedError, match=r"(?s)\n    vae: .*\n    prefix: .*'filename_prefix'.*'SaveImage'"):
        graph(own=write(nodes))


def test_a_variant_with_a_lora_or_a_cast_needs_a_place_for_it(write):
    with pytest.raises(UnsupportedError, match=r"lora: a node titled 'lora'"):
        graph(variant("nvfp4-mixed-lora"), own=write(nameless()))
    nodes = nameless()
    del nodes["1"]["inputs"]["weight_dtype"]
    assert inputs(graph(own=write(nodes)), "UNETLoader") == {"unet_name": "t.safetensors"}
    with pytest.raises(UnsupportedError, match=r"weight dtype: a node titled 'transformer'"):
        graph(variant("fp8-cast"), own=write(nodes))


def test_a_graph_with_two_samplers_needs_a_title(write):
    nodes = nameless()
    nodes["50"] = json.loads(json.dumps(nodes["8"]))
    nodes["8"]["_meta"], nodes["50"]["inputs"]["seed"] = {"title": "seed"}, ["8", 0]
    nodes["50"]["inputs"] |= {"steps": ["8", 0], "sampler_name": ["8", 0], "scheduler": ["8", 0]}
    with pytest.raises(UnsupportedError, match="nodes that could be the sampler: 8, 50; one must be"):
        graph(own=write(nodes))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no JSON"),
        ('{"nodes": [], "links": []}', "is in the editor's own format, which servers do not take"),
        ("[1]", "is not in the API format"),
        ('{"1": {"inputs": {}}}', "is not in the API format: .*class_type"),
        ('{"1": {"class_type": "A", "inputs": []}}', "is not in the API format"),
    ],
)
def test_a_file_that_is_no_workflow_says_what_to_export(write, text, says):
    with pytest.raises(UnsupportedError, match=says) as caught:
        graph(own=write(text))
    assert "Workflow > Export (API)" in caught.value.mend


def test_a_workflow_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UnsupportedError, match=r"none\.json: cannot be read: No such file") as caught:
        graph(own=tmp_path / "none.json")
    assert "--zimage-comfyui-workflow" in caught.value.mend


# ---- what it cannot draw -------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"transformer": "Folder/"}, "transformer = 'Folder/' is a folder in diffusers' layout"),
        ({"transformer": "z.gguf"}, "transformer = 'z.gguf' is GGUF"),
        ({"weight_dtype": "fp8_online"}, "weight_dtype = 'fp8_online' is vLLM-Omni's"),
        ({"text_encoder_weight_dtype": "fp8_online"}, "text_encoder_weight_dtype = 'fp8_online'"),
        ({"text_encoder_dtype": "bfloat16"}, "text_encoder_dtype = 'bfloat16'"),
        ({"kernels": "plain"}, "kernels = 'plain'"),
        ({"compile": True}, "compile = true"),
        ({"attention": "_native_cudnn"}, "attention = '_native_cudnn': it can be told native, sage, flash"),
        ({"compute_dtype": "float32", "weight_dtype": "fp8_e4m3fn"}, "compute_dtype = 'float32' cannot be told"),
    ],
)
def test_a_field_that_it_cannot_serve_is_named(changed, says):
    with pytest.raises(UnsupportedError) as caught:
        refuse_unsupported(variant(**changed), own_workflow=False)
    assert caught.value.message.startswith("bf16: ComfyUI cannot draw it: ")
    assert says in caught.value.message


def test_of_the_catalogue_it_draws_the_published_variants_and_what_nodes_can_read():
    def draws(chosen) -> bool:
        try:
            refuse_unsupported(chosen, own_workflow=False)
        except UnsupportedError:
            return False
        return True

    drawn = {name for name, chosen in CATALOG.variants.items() if draws(chosen)}
    assert {name for name, chosen in CATALOG.variants.items() if "part1" in chosen.tags} <= drawn
    assert {"nvfp4-mixed-lora", "int8-convrot"} <= drawn
    assert not {"modelopt-full", "online-fp8", "bf16-compile", "gguf-q8_0"} & drawn


def test_gguf_is_left_to_the_nodes_of_ones_own_workflow():
    refuse_unsupported(variant("gguf-q8_0"), own_workflow=True)


def test_what_is_not_the_default_is_a_flag_of_the_server():
    chosen = variant(compute_dtype="float32", vae_dtype="float32", attention="sage")
    assert needed_flags(variant()) == ()
    assert needed_flags(chosen) == ("--use-sage-attention", "--fp32-unet", "--fp32-vae")
    refuse_missing_flags(chosen, ["main.py", "--force-fp32", "--fp32-vae", "--use-sage-attention"])
    with pytest.raises(UnsupportedError, match="the running ComfyUI was started without --fp32-vae"):
        refuse_missing_flags(chosen, ["main.py", "--fp32-unet", "--use-sage-attention"])


# ---- what a server lists -----------------------------------------------------------


@pytest.mark.parametrize(
    "listed", [[["a", "b"], {"tooltip": "x"}], [["a", "b"]], ["COMBO", {"options": ["a", "b"], "multiselect": False}]]
)
def test_choices_of_an_input_in_the_old_form_and_the_new(listed):
    info = msgspec.convert({"input": {"required": {"unet_name": listed, "other": ["INT", {}]}}}, NodeInfo)
    assert info.choices("unet_name") == ("a", "b")
    assert info.choices("other") == info.choices("none") == ()
