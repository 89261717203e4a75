"""What the comfyui engine reads in a server's log: the same facts whatever the order, the colours and the version."""

from __future__ import annotations

import pytest
from standins.comfyui_plan import variant, workload

from pytest_zimage.engines.comfyui.log import emulated_ops, facts, problem, said_since
from pytest_zimage.engines.comfyui.messages import Device, Package, System, SystemStats
from pytest_zimage.engines.comfyui.runlog import RunLog
from pytest_zimage.engines.comfyui.sight import sight
from pytest_zimage.engines.comfyui.workflow import build_workflow
from pytest_zimage.engines.servers.wording import last_words

NEW = """\
\x1b[32m[INFO]\x1b[0m Set vram state to: NORMAL_VRAM
[INFO] DynamicVRAM support detected and enabled
Found comfy_kitchen backend triton: {'available': True, 'disabled': True, 'unavailable_reason': None}
Found comfy_kitchen backend cuda: {'available': True, 'disabled': False, 'capabilities': ['scaled_mm_nvfp4']}
Found comfy_kitchen backend eager: {'available': True, 'disabled': False, 'capabilities': []}
Using pytorch attention
Using pytorch attention in VAE
Detected mixed precision quantization
\x1b[36mNative ops: float8_e5m2, float8_e4m3fn , emulated ops: nvfp4, mxfp8\x1b[0m
model weight dtype torch.bfloat16, manual cast: torch.bfloat16
Model Lumina2 prepared for dynamic VRAM loading. 11739MB Staged. 0 patches attached.
Requested to load AutoencodingEngine
loaded completely; 95367.40 MB usable, 159.87 MB loaded, full load: True
 12%|#2        | 1/8\r100%|##########| 8/8
Prompt executed in 1.33 seconds
"""
OLD = """\
Set vram state to: DISABLED
Using sub quadratic optimization for attention, if you have memory issues try: --use-split-cross-attention
model weight dtype torch.float32, manual cast: None
Requested to load ZImageTEModel_
loaded completely; 100.00 MB usable, 2.00 MB loaded, full load: True
Requested to load Lumina2
loaded partially; 12.00 MB usable, 2.00 MB loaded, 1.00 MB offloaded, 0.00 MB buffer reserved, lowvram patches: 0
"""


def told(text: str) -> dict[str, str]:
    """Facts of a log all of which came since the run began."""
    return facts("", text)


def looked(text: str, before: str = "") -> RunLog:
    """A log that was `before` when the run began, and is `text` when it is looked at."""
    log = RunLog(iter([before, text]).__next__)
    log.look()
    return log


def test_facts_of_a_log():
    assert told(NEW) == {
        "native_ops": "float8_e4m3fn, float8_e5m2",
        "emulated_ops": "mxfp8, nvfp4",
        "kitchen_backends": "cuda, eager",
        "dtype": "torch.bfloat16, manual cast torch.bfloat16",
        "attention": "pytorch",
        "vram_state": "NORMAL_VRAM",
        "dynamic_vram": "enabled",
        "loaded": "AutoencodingEngine completely, Lumina2 by dynamic VRAM",
    }


def test_an_older_version_says_less():
    assert told(OLD) == {
        "dtype": "torch.float32, manual cast None",
        "attention": "sub quadratic",
        "vram_state": "DISABLED",
        "loaded": "Lumina2 partially, ZImageTEModel_ completely",
    }
    assert told("") == {}


def test_the_order_of_operations_does_not_count():
    other = NEW.replace("float8_e5m2, float8_e4m3fn ", "float8_e4m3fn, float8_e5m2 ").replace(
        "nvfp4, mxfp8", "mxfp8,nvfp4"
    )
    assert told(other) == told(NEW)
    assert emulated_ops(other) == ("mxfp8", "nvfp4")


def test_two_lines_and_no_emulated_operations():
    assert emulated_ops("Native ops: int8_tensorwise\nemulated ops: nvfp4, mxfp8") == ("mxfp8", "nvfp4")
    assert emulated_ops("Native ops: int8_tensorwise, nvfp4") == ()
    assert told("Native ops: b, a , emulated ops:")["native_ops"] == "a, b"


def test_rounds_that_load_the_same_again_change_nothing():
    assert told(OLD + OLD) == told(OLD)


def test_last_words_are_without_colours_and_few():
    words = last_words("\n".join(f"\x1b[31mline {i}\x1b[0m" for i in range(40)))
    assert words.startswith("\nlast lines of its log:\n    line 25\n")
    assert words.endswith("    line 39")
    assert last_words("\n\n") == ""


def test_what_a_server_says_of_itself_leaves_out_what_differs_from_run_to_run():
    argv = ["/somewhere/main.py", "--port", "4711", "--fast", "--listen", "127.0.0.1", "--cpu"]
    argv += [
        "--output-directory=/somewhere/out",
        "--extra-model-paths-config",
        "/a.yaml",
        "/b.yaml",
        "--base-directory",
    ]
    argv += ["/somewhere", "--reserve-vram", "2", "--listen"]
    packages = [Package("comfy-kitchen", "0.2.40"), Package("comfy-aimdo", None)]
    stats = SystemStats(System("0.33.0", "3.12.3 (main, Jan  1)", "2.11.0+cu130", argv, packages))
    ready = build_workflow(variant(), workload(), None)
    seen = sight(stats, looked(OLD), variant(), ready, ("a note",), {"comfy-kitchen": "0.1", "other": ""})
    assert seen.environment == {
        "comfyui": "0.33.0",
        "comfyui.python": "3.12.3",
        "comfyui.torch": "2.11.0+cu130",
        "comfyui.argv": "--fast --cpu --reserve-vram 2",
        "comfyui.workflow": "published",
        "comfyui.comfy-kitchen": "0.2.40",
        "comfyui.dtype": "torch.float32, manual cast None",
        "comfyui.attention": "sub quadratic",
        "comfyui.vram_state": "DISABLED",
        "comfyui.loaded": "Lumina2 partially, ZImageTEModel_ completely",
    }
    assert seen.notes == ("a note", "Lumina2 did not fit into memory and was loaded in part")


def test_a_fast_cast_that_dynamic_vram_makes_a_plain_one_is_told():
    def unquantised(name: str, log: str):
        ready = build_workflow(variant(name), workload(), None)
        return sight(SystemStats(System()), looked(log), variant(name), ready, (), {}).unquantised

    [why] = unquantised("fp8-cast-fast", NEW)
    assert why.startswith("fp8_e4m3fn_fast under dynamic VRAM, which --disable-dynamic-vram turns off: ComfyUI casts")
    assert unquantised("fp8-cast", NEW) == ()
    assert unquantised("fp8-cast-fast", NEW.replace("detected and enabled", "disabled")) == ()


@pytest.mark.parametrize(
    ("type", "capability", "flags", "where"),
    [
        ("cpu", "", (), "on a CPU"),
        ("cpu", "9.0", (), "on a CPU"),
        ("cuda", "8.6", (), "on a GPU of compute capability 8.6, below 8.9"),
        ("cuda", "7.5", (), "on a GPU of compute capability 7.5, below 8.9"),
        ("cuda", "8.9", (), "under dynamic VRAM"),
        ("cuda", "12.1", (), "under dynamic VRAM"),
        ("cuda", "", (), "under dynamic VRAM"),
        ("cuda", "8.6", ("--supports-fp8-compute",), "under dynamic VRAM"),
        ("cpu", "", ("--supports-fp8-compute",), "under dynamic VRAM"),
    ],
)
def test_the_likeliest_reason_of_a_plain_cast_is_named(type, capability, flags, where):
    fast = variant("fp8-cast-fast")
    stats = SystemStats(System(argv=["main.py", *flags]), [Device("it", type)])
    seen = sight(stats, looked(NEW), fast, build_workflow(fast, workload(), None), (), {}, capability)
    [why] = seen.unquantised
    assert why.startswith(f"fp8_e4m3fn_fast {where}")


def entries(*lines: str, first: int = 0) -> list[str]:
    """As the server keeps them: the time before each, and a line's end that may be an entry of its own."""
    return [f"2026-01-01T00:00:{first + number:09.6f} - {line}" for number, line in enumerate(lines)]


START = entries("Set vram state to: NORMAL_VRAM\n", "Using pytorch attention\n")
OTHERS = entries("model weight dtype torch.float8_e4m3fn, manual cast: torch.bfloat16\n", first=10)
STEPS = [entry for step in range(8) for entry in entries(f"\r {step}/8", "\n", first=20 + 2 * step)]
OURS = entries("model weight dtype torch.bfloat16, manual cast: None\n", first=50)


def test_what_others_drew_before_is_not_taken_for_this_runs():
    log = looked("".join([*START, *OTHERS, *STEPS, *OURS]), before="".join([*START, *OTHERS, *STEPS]))
    assert log.since == "".join(OURS)
    assert log.facts() == {
        "vram_state": "NORMAL_VRAM",
        "attention": "pytorch",
        "dtype": "torch.bfloat16, manual cast None",
    }


def test_what_has_left_the_log_since_is_known_all_the_same():
    """Entries are lost from the beginning: first those of the start, then all that was there before."""
    whole = [*START, *OTHERS, *STEPS]
    for lost in range(len(whole) + 1):
        assert said_since("".join(whole), "".join([*whole, *OURS][lost:])) == "".join(OURS)
    log = RunLog(iter(["".join(START), "".join([*START, *OURS]), "".join(STEPS)]).__next__)
    log.look()
    log.look()
    assert set(log.facts()) == {"vram_state", "attention", "dtype"}


def test_a_line_that_was_still_written_is_read_anew():
    before = "".join(START) + "2026-01-01T00:00:09.000000 - \r 3/8"
    now = "".join(START) + "2026-01-01T00:00:09.500000 - \r 8/8\n" + "".join(OURS)
    assert said_since(before, now).endswith("".join(OURS))
    assert "Set vram" not in said_since(before, now)


def test_a_log_that_is_not_told_for_once_loses_nothing():
    log = RunLog(iter(["".join(START), "", "".join([*START, *OURS])]).__next__)
    log.look()
    assert log.look() == "".join(OURS)


def test_the_start_of_a_server_is_known_from_an_earlier_run():
    log = RunLog(lambda: "".join(OURS), {"attention": "sage"})
    assert log.facts() == {"attention": "sage"}


def test_weights_that_a_file_lacks_are_a_problem():
    lacking = problem("2026 - \x1b[33munet missing: ['layers.1.feed_forward.w2.weight', 'x', 'y', 'z', 'v']\x1b[0m\n")
    assert lacking.startswith("its files lack 'layers.1.feed_forward.w2.weight', 'x', 'y', 'z', ...: ")
    assert "its files lack 'model.norm.weight': " in problem("clip missing: ['logit_scale', 'model.norm.weight']")
    assert "its files lack 'decoder.conv_in.bias': " in problem("Missing VAE keys ['decoder.conv_in.bias']")


def test_weights_that_no_image_needs_may_be_missing():
    text = "clip missing: ['logit_scale', 'text_projection.weight']\nMissing VAE keys ['encoder.conv_in.bias']\n"
    assert problem(text) == ""
    assert problem("unet unexpected: ['norm_final.weight']\n" + NEW) == ""


def test_values_that_are_no_numbers_are_a_problem():
    text = "nodes.py:1611: RuntimeWarning: invalid value encountered in cast\n  img = Image.fromarray(...)\n"
    assert "no numbers" in problem(text)
