"""The synthetic writer: the official formats at any size, the same bytes every time, kept sound in a shared cache."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints.formats import detect
from pytest_zimage.checkpoints.header import read_header
from pytest_zimage.checkpoints.synthetic import (
    ensure,
    ensure_model_set,
    manifest,
    plan,
    read_manifest,
    set_dims,
    sink,
    writer,
    writer_hash,
)
from pytest_zimage.checkpoints.synthetic.build import build_model_set
from pytest_zimage.checkpoints.synthetic.manifest import MANIFEST, PARTIAL
from pytest_zimage.checkpoints.synthetic.plan import FILE_NAMES, plan_files
from pytest_zimage.checkpoints.synthetic.sink import FileSink
from pytest_zimage.checkpoints.synthetic.storage import describe, encode
from pytest_zimage.checkpoints.synthetic.tokenizer import FILES as TOKENIZER_FILES
from pytest_zimage.checkpoints.synthetic.tokenizer import write_tokenizer
from pytest_zimage.checkpoints.synthetic.values import make_weight
from pytest_zimage.errors import CatalogError, CheckpointError

NAME = "synthetic-tiny"
BF16, KIJAI, NVFP4 = (f"diffusion_models/{name}" for name in FILE_NAMES["transformer"])
ENCODER, MIXED = (f"text_encoders/{name}" for name in FILE_NAMES["text_encoder"])
VAE = "vae/ae.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def catalog():
    return load_catalog()


@pytest.fixture(scope="module")
def dims(catalog):
    return set_dims(NAME, catalog)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, dims):
    """The tiny set, written once by the child process as in real life."""
    root = tmp_path_factory.mktemp("cache") / NAME
    lines = []
    assert ensure_model_set(NAME, dims, root, say=lines.append) == []
    assert any("ae.safetensors" in line for line in lines)
    return root


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / NAME))


@pytest.fixture
def written(monkeypatch):
    """Has sets written in this process, which is quicker than a child; returns the file names of each writing."""
    calls = []

    def write(name, dims, root, file_names, device, say):
        calls.append(file_names)
        build_model_set(name, dims, root, file_names, device=torch.device(device), say=say)

    monkeypatch.setattr(ensure, "_write", write)
    return calls


def opened(root, path):
    return safe_open(root / path, framework="pt")


def tensors(root, path):
    with opened(root, path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def contents(path):
    header = read_header(path)
    raw = path.read_bytes()
    return detect(header, lambda tensor: raw[tensor.begin : tensor.end])


# ---- formats ---------------------------------------------------------------


def test_real_dims_have_the_official_files_tensors_and_bytes(catalog):
    plans = {plan.path: plan for plan in plan_files(set_dims("synthetic-full", catalog))}
    found = {path: (len(plan.header()[1]), plan.header()[2]) for path, plan in plans.items()}
    assert {path: count for path, (count, _) in found.items()} == {
        BF16: 453, KIJAI: 453 + 208 + 1, NVFP4: 993, ENCODER: 398, MIXED: 788, VAE: 244,
    }  # fmt: skip
    for path, (_, size) in found.items():
        assert size == pytest.approx(catalog.files[Path(path).name].bytes, rel=0.001)

    def by_dtype(path):
        counts = {}
        for tensor in plans[path].stored():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
        return counts

    assert by_dtype(NVFP4) == {"U8": 180, "F8_E4M3": 180, "F32": 360, "BF16": 273}
    assert by_dtype(MIXED) == {"BF16": 209, "F8_E4M3": 189, "U8": 201, "F32": 189}
    assert by_dtype(KIJAI) == {"F8_E4M3": 209, "F32": 453}
    storages = [weight.storage for weight in plans[MIXED].weights]
    assert (storages.count("fp8_blob"), storages.count("nvfp4_blob")) == (177, 12)


def test_bf16_files(tiny, dims):
    transformer = tensors(tiny, BF16)
    assert {tensor.dtype for tensor in transformer.values()} == {torch.bfloat16}
    assert transformer["layers.0.attention.qkv.weight"].shape == (3 * 384, 384)
    assert transformer["context_refiner.0.attention.out.weight"].shape == (384, 384)
    assert "context_refiner.0.adaLN_modulation.0.weight" not in transformer
    assert not [name for name in transformer if "to_q" in name or name.startswith("all_")]
    assert transformer["x_pad_token"].abs().sum() > 0
    encoder = tensors(tiny, ENCODER)
    assert {tensor.dtype for tensor in encoder.values()} == {torch.bfloat16}
    assert all(name.startswith("model.") for name in encoder)
    assert opened(tiny, BF16).metadata() is None


def test_kijai_file(tiny):
    file = tensors(tiny, KIJAI)
    assert (file["scaled_fp8"].dtype, file["scaled_fp8"].shape) == (torch.float8_e4m3fn, (2,))
    plain = tensors(tiny, BF16)
    linears = {name for name, tensor in plain.items() if tensor.dim() == 2 and name.endswith(".weight")}
    assert {"x_embedder.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight"} < linears
    for name, tensor in plain.items():
        if name in linears:
            scale = file[f"{name.removesuffix('.weight')}.scale_weight"]
            assert (file[name].dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (1,))
            assert relative(file[name].float() * scale, tensor) == pytest.approx(0.026, abs=0.004)
        else:
            assert file[name].dtype == torch.float32
            assert torch.equal(file[name], tensor.float())
    assert len(file) == len(plain) + len(linears) + 1
    read = contents(tiny / KIJAI)
    assert read.source == "scaled_fp8"
    assert all(held.weight_only for held in read.quantised.values())


def test_nvfp4_file(tiny):
    with opened(tiny, NVFP4) as file:
        metadata = file.metadata()
    record = json.loads(metadata["_quantization_metadata"])
    assert list(metadata) == ["_quantization_metadata"]
    assert record["format_version"] == "1.0"
    plain, file = tensors(tiny, BF16), tensors(tiny, NVFP4)
    linears = {
        name.removesuffix(".weight")
        for name, tensor in plain.items()
        if name.startswith("layers.") and tensor.dim() == 2
    }
    assert record["layers"] == {layer: {"format": "nvfp4"} for layer in linears}
    assert len(linears) == 2 * 6
    assert not [name for name in file if name.endswith("comfy_quant")]
    for name, tensor in plain.items():
        layer = name.removesuffix(".weight")
        if layer not in linears:
            assert torch.equal(file[name], tensor)
            continue
        rows, columns = tensor.shape
        assert (file[name].dtype, file[name].shape) == (torch.uint8, (rows, columns // 2))
        scale = file[f"{layer}.weight_scale"]
        assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (rows, columns // 16))
        for suffix in ("weight_scale_2", "input_scale"):
            assert (file[f"{layer}.{suffix}"].dtype, file[f"{layer}.{suffix}"].shape) == (torch.float32, ())
        assert relative(dequantised_nvfp4(file, layer), tensor) == pytest.approx(0.10, abs=0.02)
    assert contents(tiny / NVFP4).source == "header"


def test_mixed_text_encoder(tiny):
    plain, file = tensors(tiny, ENCODER), tensors(tiny, MIXED)
    assert opened(tiny, MIXED).metadata() is None
    seen = set()
    for name, tensor in plain.items():
        layer = name.removesuffix(".weight")
        blob = file.get(f"{layer}.comfy_quant")
        if blob is None:
            assert torch.equal(file[name], tensor)
            continue
        format_ = json.loads(bytes(blob.tolist()))["format"]
        seen.add(format_)
        if format_ == "nvfp4":
            assert relative(dequantised_nvfp4(file, layer), tensor) == pytest.approx(0.10, abs=0.02)
        else:
            assert file[name].dtype == torch.float8_e4m3fn
            scale = file[f"{layer}.weight_scale"]
            assert scale.shape == ()
            assert relative(file[name].float() * scale, tensor) == pytest.approx(0.026, abs=0.004)
    assert seen == {"float8_e4m3fn", "nvfp4"}
    assert "model.layers.0.mlp.down_proj.comfy_quant" not in file
    assert not [name for name in file if name.endswith("input_scale")]
    assert contents(tiny / MIXED).source == "blobs"


def test_vae_file_draws_something(tiny, dims):
    from pytest_zimage.checkpoints.keymap import vae_to_diffusers
    from pytest_zimage.checkpoints.networks import meta_network

    file = tensors(tiny, VAE)
    assert {tensor.dtype for tensor in file.values()} == {torch.float32}
    assert file["decoder.mid.attn_1.q.weight"].shape[2:] == (1, 1)
    assert not [name for name in file if "quant_conv" in name]
    state = {}
    for name, tensor in file.items():
        there = vae_to_diffusers(name, 4)
        state[there.name] = tensor[:, :, 0, 0] if there.pointwise else tensor
    network = meta_network("vae", dims)
    network.load_state_dict(state, assign=True)
    with torch.inference_mode():
        image = network.eval().decode(make_weight("latents", (1, 16, 8, 8), torch.float32, CPU)).sample
    assert torch.isfinite(image).all()
    assert image.std() > 0.1
    assert (image.abs() < 1).float().mean() > 0.5, "not all saturated"


def relative(found, expected):
    expected = expected.float()
    return ((found - expected).norm() / expected.norm()).item()


def dequantised_nvfp4(file, layer):
    """By the format's own definition, not by comfy-kitchen: high nibble first, scales in tiles of 128 x 4."""
    packed = file[f"{layer}.weight"]
    rows, columns = packed.shape[0], packed.shape[1] * 2
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(rows, columns).long()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.where(codes < 8, 1.0, -1.0) * table[codes % 8]
    scales = file[f"{layer}.weight_scale"].float()
    tiled = scales.reshape(rows // 128, columns // 64, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, columns // 16)
    return values * tiled.repeat_interleave(16, dim=1) * file[f"{layer}.weight_scale_2"]


def test_what_is_planned_is_what_is_encoded():
    weight = make_weight("x", (128, 64), torch.bfloat16, CPU)
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}
    for storage in ("bf16", "f32", "fp8_scale_weight", "fp8_blob", "nvfp4_header", "nvfp4_blob", "modelopt_fp8"):
        planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in describe(storage, "x.weight", (128, 64))}
        encoded = encode(storage, "x.weight", weight)
        assert {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in encoded.items()} == planned


def test_a_tensor_that_is_not_as_planned_is_refused(dims, tmp_path, monkeypatch):
    real = plan.encode
    monkeypatch.setattr(plan, "encode", lambda *args: {name: t.double() for name, t in real(*args).items()})
    with pytest.raises(CheckpointError, match="planned F32"), FileSink(CPU) as sink:
        list(writer.write_files(plan_files(dims)[-1:], tmp_path, CPU, sink, lambda written: None))


def test_a_file_that_lacks_a_planned_tensor_is_refused(dims, tmp_path, monkeypatch):
    real = plan.encode
    monkeypatch.setattr(plan, "encode", lambda *args: {} if "conv_in" in args[1] else real(*args))
    with pytest.raises(CheckpointError, match="planned bytes were written"), FileSink(CPU) as sink:
        list(writer.write_files(plan_files(dims)[-1:], tmp_path, CPU, sink, lambda written: None))


def test_each_weight_is_made_once_for_all_files_of_its_role(dims, tmp_path, monkeypatch):
    real, made = writer.make_weight, []
    monkeypatch.setattr(writer, "make_weight", lambda name, *args: made.append(name) or real(name, *args))
    plans = [plan for plan in plan_files(dims) if plan.role == "text_encoder"]
    with FileSink(CPU) as sink:
        found = dict(writer.write_files(plans, tmp_path, CPU, sink, lambda written: None))
    assert sorted(made) == sorted(f"text_encoder/{weight.name}" for weight in plans[0].weights)
    assert set(found) == {ENCODER, MIXED}


# ---- values ----------------------------------------------------------------


def reference(name, index):
    """The value's integer, in plain Python."""
    import hashlib

    digest = hashlib.sha256(name.encode()).digest()
    factor, offset, key = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8))
    mask = 0xFFFFFFFF
    x = (index * (factor | 1) + offset) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return sum(((x ^ (x >> 16)) ^ key).to_bytes(4, "little"))


def test_values_follow_from_name_and_index_alone():
    shape = (1030, 300)
    got = make_weight("transformer/layers.0.attention.out.weight", shape, torch.float32, CPU).flatten()
    # Scattered, and across the border of the first chunk.
    for index in (0, 1, 77, 262143, 262144, 262145, got.numel() - 1):
        sums = reference("transformer/layers.0.attention.out.weight", index)
        expected = (sums - 510) / math.sqrt(4 * (256**2 - 1) / 12) / math.sqrt(300)
        assert got[index].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert got.std().item() == pytest.approx(1 / math.sqrt(300), rel=0.01)
    assert abs(got.mean().item()) < 0.01 / math.sqrt(300)


def test_tensors_are_unrelated():
    a = make_weight("a", (200, 200), torch.float32, CPU).flatten()
    b = make_weight("b", (200, 200), torch.float32, CPU).flatten()
    assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1].item()) < 0.03
    assert abs(torch.corrcoef(torch.stack((a[1:], a[:-1])))[0, 1].item()) < 0.03


def test_kinds_of_weights():
    norm = make_weight("t/norm.weight", (4096,), torch.float32, CPU)
    bias = make_weight("t/linear.bias", (4096,), torch.float32, CPU)
    pad = make_weight("t/x_pad_token", (1, 4096), torch.float32, CPU)
    assert norm.mean().item() == pytest.approx(1, abs=0.02)
    assert 0 < bias.std().item() < 0.05
    assert pad.std().item() == pytest.approx(1, abs=0.05)


# ---- tokenizer -------------------------------------------------------------


def test_tokenizer(tiny, dims):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "tokenizer", local_files_only=True)
    assert len(tokenizer) <= dims.text_encoder["vocab_size"]
    for prompt in ("a cat", "héllo wörld", "北京的秋天 🍂", "tabs\tand\nlines  and   spaces", "<b>'quoted'</b>"):
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        assert text == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert max(ids) < dims.text_encoder["vocab_size"]
        assert tokenizer.convert_ids_to_tokens(ids[:1]) == ["<|im_start|>"]
    quiet = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert quiet.endswith("<think>\n\n</think>\n\n")
    padded = tokenizer(["a"], padding="max_length", max_length=8, truncation=True)
    assert padded.attention_mask == [[1] + [0] * 7]


def test_tokenizer_needs_room(tmp_path):
    with pytest.raises(ValueError, match="no room"):
        write_tokenizer(tmp_path, 256)


# ---- the cache -------------------------------------------------------------


def test_set_on_disk(tiny, dims):
    record = read_manifest(tiny)
    assert (record.name, record.dims, record.writer) == (NAME, dims, writer_hash(dims))
    assert set(record.files) == {BF16, KIJAI, NVFP4, ENCODER, MIXED, VAE, *TOKENIZER_FILES}
    for path, file in record.files.items():
        assert manifest.record_file(tiny / path) == file
    assert not list(tiny.glob(f"{PARTIAL}*"))


def test_sound_set_is_not_hashed_again(tiny, dims, monkeypatch):
    monkeypatch.setattr(manifest, "record_file", lambda path: pytest.fail(f"{path} was hashed"))
    assert ensure_model_set(NAME, dims, tiny) == []


def test_same_bytes_again_from_two_processes_at_once(tiny, dims, tmp_path):
    """One of them by a link, as where two caches share a set."""
    code = (
        "import sys; from pathlib import Path\n"
        "from pytest_zimage.catalog import load_catalog\n"
        "from pytest_zimage.checkpoints.synthetic import ensure_model_set, set_dims\n"
        f"dims = set_dims({NAME!r}, load_catalog())\n"
        f"print(ensure_model_set({NAME!r}, dims, Path(sys.argv[1]), say=print))"
    )
    root, link = tmp_path / NAME, tmp_path / "another" / NAME
    link.parent.mkdir()
    link.symlink_to(root)
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        for path in (root, link)
    ]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [text.strip().splitlines()[-1] for text in said] == ["[]", "[]"]
    assert sum("ae.safetensors" in text for text in said) == 1, "one writes, the other waits"
    assert read_manifest(root) == read_manifest(tiny)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_file_is_written_anew_with_a_note(copy, dims, written, damage):
    path = copy / NVFP4
    before = read_manifest(copy)
    if damage == "flip":
        with path.open("r+b") as file:
            file.seek(5_000_000)
            byte = file.read(1)[0]
            file.seek(5_000_000)
            file.write(bytes((byte ^ 1,)))
    elif damage == "truncate":
        os.truncate(path, 1000)
    else:
        path.unlink()
    (note,) = ensure_model_set(NAME, dims, copy)
    assert f"{NVFP4} written anew" in note
    assert written == [[path.name]], "only the damaged file"
    assert read_manifest(copy) == before
    assert manifest.record_file(path) == before.files[NVFP4]
    assert ensure_model_set(NAME, dims, copy) == []


def test_damaged_tokenizer_alone(copy, dims, written):
    (copy / TOKENIZER_FILES[0]).write_text("{}")
    (note,) = ensure_model_set(NAME, dims, copy)
    assert TOKENIZER_FILES[0] in note
    assert written == [[]]
    assert ensure_model_set(NAME, dims, copy) == []


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda root: (root / MANIFEST).unlink(), "was not finished"),
        (lambda root: (root / MANIFEST).write_text('{"name": "synth'), "not a readable"),
    ],
)
def test_half_written_set_is_written_anew_with_a_note(copy, dims, written, spoil, why):
    (copy / f"{PARTIAL}123").mkdir()
    spoil(copy)
    (note,) = ensure_model_set(NAME, dims, copy, ["ae.safetensors"])
    assert why in note
    assert written == [["ae.safetensors"]]
    assert set(read_manifest(copy).files) == {VAE, *TOKENIZER_FILES}
    assert not list(copy.glob(f"{PARTIAL}*"))


def test_changed_writer_replaces_the_whole_set(copy, dims, written, monkeypatch):
    record = read_manifest(copy)
    manifest.write_manifest(copy, manifest.Manifest(record.name, record.dims, "of before", record.files), [])
    (note,) = ensure_model_set(NAME, dims, copy, ["ae.safetensors"])
    assert "the writer changed" in note
    assert f"if another checkout uses {copy.parent}, give each its own by --zimage-cache" in note
    assert not (copy / BF16).exists(), "what another writer wrote does not stay"


def test_files_are_added_as_they_are_needed(tmp_path, dims, written):
    root = tmp_path / NAME
    assert ensure_model_set(NAME, dims, root, ["ae.safetensors"]) == []
    assert ensure_model_set(NAME, dims, root, ["ae.safetensors", "qwen_3_4b.safetensors"]) == []
    assert written == [["ae.safetensors"], ["qwen_3_4b.safetensors"]]
    assert set(read_manifest(root).files) == {VAE, ENCODER, *TOKENIZER_FILES}


def test_file_that_the_set_does_not_have(tmp_path, dims, written):
    with pytest.raises(CatalogError, match=r"no file 'mine\.safetensors'"):
        ensure_model_set(NAME, dims, tmp_path / NAME, ["mine.safetensors"])
    assert written == []


def test_writer_hash_covers_dims_and_sources(tmp_path, catalog, dims, monkeypatch):
    assert writer_hash(dims) != writer_hash(catalog.models["official"])
    here = Path(manifest.__file__).parent.parent
    shutil.copytree(here, tmp_path / "checkpoints", ignore=shutil.ignore_patterns("__pycache__"))
    before = writer_hash(dims)
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "checkpoints" / "synthetic" / "manifest.py"))
    assert writer_hash(dims) == before
    for source in (
        "synthetic/values.py",
        "synthetic/storage.py",
        "synthetic/plan.py",
        "synthetic/sink.py",
        "keymap.py",
    ):
        path = tmp_path / "checkpoints" / source
        path.write_text(path.read_text() + "\n# another line\n")
        assert writer_hash(dims) != before
        before = writer_hash(dims)


def test_full_disk_is_refused_before_anything_is_written(tmp_path, dims, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=50_000_000))
    root = tmp_path / NAME
    with pytest.raises(CheckpointError, match=r"need 0\.04 GB and the disk has 0\.05 GB left") as caught:
        build_model_set(NAME, dims, root, device=CPU, say=lambda line: None)
    assert caught.value.mend
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
def test_disk_that_fills_up_leaves_the_set_as_it_was(copy, dims, monkeypatch, call):
    real, calls = getattr(os, call), []

    def fill(*args):
        calls.append(args)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(sink.os, call, fill)
    before, threads, files = read_manifest(copy), set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        build_model_set(NAME, dims, copy, device=CPU, say=lambda line: None)
    assert re.search(r"safetensors: cannot be written after \S+ of \S+ GB", caught.value.message)
    assert "free some space" in caught.value.mend
    assert read_manifest(copy) == before
    assert manifest.damaged_files(copy, before, before.files) == {}
    assert not list(copy.glob(f"{PARTIAL}*"))
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) == files


def test_read_only_cache_with_a_sound_set_is_used(tiny, dims, tmp_path, monkeypatch):
    def refuse(*args, **keywords):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(ensure.os, "open", refuse)
    assert ensure_model_set(NAME, dims, tiny) == []
    with pytest.raises(CheckpointError, match="cannot be written"):
        ensure_model_set(NAME, dims, tmp_path / NAME)


def test_ctrl_c_ends_the_writer(tmp_path, dims, monkeypatch):
    children = []

    class Child(subprocess.Popen):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            children.append(self)

    def interrupt(line):
        if "writing" in line:
            assert list(root.glob(f"{PARTIAL}*"))
            raise KeyboardInterrupt

    monkeypatch.setattr(ensure.subprocess, "Popen", Child)
    root = tmp_path / NAME
    with pytest.raises(KeyboardInterrupt):
        ensure_model_set(NAME, dims, root, say=interrupt)
    assert children[0].returncode is not None
    assert not list(root.glob(f"{PARTIAL}*"))
    assert read_manifest(root) is None


def test_failing_writer_speaks(tmp_path, dims):
    with pytest.raises(CheckpointError, match=r"(?s)exit status 1.*nonsense") as caught:
        ensure_model_set(NAME, dims, tmp_path / NAME, device="nonsense")
    assert "python -m pytest_zimage.checkpoints.synthetic" in caught.value.mend


def test_writers_own_refusal_keeps_its_mend():
    error = ensure._failure(NAME, 1, "Warning: x\nthe disk has 1 GB left\n  mend: free some space\n")
    assert "the disk has 1 GB left" in error.message
    assert error.mend == "free some space"
    assert "signal SIGKILL" in ensure._failure(NAME, -9, "").message


def test_dry_run_writes_nothing(capsys, tmp_path, monkeypatch):
    from pytest_zimage.checkpoints.synthetic.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert main(["--set", "synthetic-full", "--dry-run"]) == 0
    assert f"{BF16}: 453 tensors, 12309866400 bytes" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("device", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_weights_are_made_on_the_gpu_that_was_named(tmp_path, monkeypatch, device, current):
    """xdist's second worker writes on the second GPU, where comfy-kitchen refused to quantise to MXFP8."""
    from pytest_zimage.checkpoints.synthetic.__main__ import main

    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(
        "pytest_zimage.checkpoints.synthetic.build.build_model_set",
        lambda *_, device, **__: chosen.append(f"made on {device}"),
    )
    assert main(["--set", "synthetic-tiny", "--out", str(tmp_path), "--device", device]) == 0
    assert chosen == [*current, f"made on {device}"]


def test_tensors_are_aligned_to_their_own_size(tiny):
    for path in (BF16, KIJAI, NVFP4, ENCODER, MIXED, VAE):
        sizes = {"F32": 4, "BF16": 2}
        header = read_header(tiny / path)
        assert all(tensor.begin % sizes.get(tensor.dtype, 1) == 0 for tensor in header.tensors.values())
        assert struct.unpack("<Q", (tiny / path).read_bytes()[:8])[0] % 8 == 0
