"""From a model set's name to files: ComfyUI's folders, synthetic sets, tokenizers, and what is missing from each."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pytest_zimage.catalog import ModelFile, load_catalog
from pytest_zimage.checkpoints.modelset import file_fingerprint, open_model_set
from pytest_zimage.checkpoints.synthetic.manifest import FileRecord, Manifest, write_manifest, writer_hash
from pytest_zimage.checkpoints.tokenizers import hub_cache
from pytest_zimage.errors import CatalogError, CheckpointError, MissingFileError

BF16 = "z_image_turbo_bf16.safetensors"


@pytest.fixture
def catalog():
    return load_catalog()


@pytest.fixture(autouse=True)
def empty_hub(tmp_path, monkeypatch):
    """A hub cache of the test's own."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


@pytest.fixture
def opened(tmp_path, catalog):
    """Opens a folder of official weights below the test's own."""
    (tmp_path / "comfy").mkdir()

    def open_(spec=None, tokenizer=None):
        return open_model_set(spec or str(tmp_path / "comfy"), catalog, cache=tmp_path / "cache", tokenizer=tokenizer)

    return open_


def put(path, size=0, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        with path.open("wb") as file:
            file.truncate(size)
    else:
        path.write_bytes(content)
    return path


def put_tokenizer(folder, chat=True):
    put(folder / "tokenizer_config.json", content=b'{"added": "<|im_start|>"}' if chat else b"{}")
    put(folder / "tokenizer.json", content=b"{}")
    return folder


@pytest.mark.parametrize(
    "place",
    [
        "diffusion_models",
        "unet",
        "models/diffusion_models",
        "models/unet",
        "split_files/diffusion_models",
        "models/diffusion_models/z-image/turbo",
    ],
)
def test_finds_a_file_wherever_comfyui_would(tmp_path, catalog, opened, place):
    path = put(tmp_path / "comfy" / place / BF16, catalog.files[BF16].bytes)
    models = opened()
    assert models.name == "official"
    assert models.find("transformer", BF16) == path


def test_files_of_a_variant(tmp_path, catalog, opened):
    variant = catalog.variants["nvfp4-fp8e"]
    for folder, name in (
        ("unet", variant.transformer),
        ("clip", variant.text_encoder),
        ("vae", variant.vae),
    ):
        put(tmp_path / "comfy" / "models" / folder / name, catalog.files[name].bytes)
    assert {role: path.name for role, path in opened().files(variant).items()} == variant.files()


def test_missing_file_lists_every_folder_and_the_source(tmp_path, opened):
    with pytest.raises(MissingFileError) as caught:
        opened().find("transformer", BF16)
    for place in ("diffusion_models", "unet", "models/diffusion_models", "models/unet", "split_files/diffusion_models"):
        assert str(tmp_path / "comfy" / place) in caught.value.message
    assert "https://huggingface.co/Comfy-Org/z_image_turbo" in caught.value.mend


def test_missing_file_of_the_users_own(opened):
    with pytest.raises(MissingFileError) as caught:
        opened().find("transformer", "mine.safetensors")
    assert "diffusion_models" in caught.value.mend


@pytest.mark.parametrize(("share", "sound"), [(0.9799, False), (0.9801, True), (1.0, True), (1.1, True)])
def test_incomplete_download(tmp_path, catalog, opened, share, sound):
    published = catalog.files[BF16]
    assert isinstance(published, ModelFile)
    put(tmp_path / "comfy" / "unet" / BF16, int(published.bytes * share))
    if sound:
        assert opened().find("transformer", BF16).name == BF16
    else:
        with pytest.raises(CheckpointError, match="incomplete download"):
            opened().find("transformer", BF16)


def test_same_file_twice_below_a_folder(tmp_path, opened):
    for place in ("a", "b"):
        put(tmp_path / "comfy" / "vae" / place / "mine.safetensors")
    with pytest.raises(CheckpointError, match="more than once"):
        opened().find("vae", "mine.safetensors")


def test_what_is_no_model_set(tmp_path, opened):
    with pytest.raises(CatalogError, match="did you mean 'synthetic-tiny'"):
        opened("synthetic-tny")
    with pytest.raises(CatalogError, match="neither a model set nor a folder"):
        opened("nonsense")
    with pytest.raises(MissingFileError, match="no such folder"):
        opened(str(tmp_path / "nowhere"))


def test_synthetic_names_need_no_folder(tmp_path, catalog, opened):
    tiny, full = opened("synthetic-tiny"), opened("synthetic-full")
    assert tiny.root == tmp_path / "cache" / "synthetic-tiny"
    assert tiny.dims == catalog.models["synthetic-tiny"]
    assert full.dims == catalog.models["official"]
    with pytest.raises(MissingFileError, match="'synthetic-full'"):
        full.find("transformer", BF16)


@pytest.mark.parametrize("below", ["", "models"])
def test_folder_with_the_writers_record_is_that_set(tmp_path, catalog, opened, below):
    dims = catalog.models["synthetic-tiny"]
    root = tmp_path / "comfy" / below
    path = put(root / "diffusion_models" / BF16, 10)
    record = {f"diffusion_models/{BF16}": FileRecord(10, "0" * 64)}
    write_manifest(root, Manifest("synthetic-tiny", dims, writer_hash(dims), record), [])
    models = opened()
    assert (models.name, models.dims, models.root) == ("synthetic-tiny", dims, root)
    # The official file's size does not apply to it.
    assert models.find("transformer", BF16) == path
    assert models.ensure() == []
    os.truncate(path, 9)
    with pytest.raises(CheckpointError, match="9 bytes, where its record says 10"):
        models.find("transformer", BF16)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a readable"), ('{"name": "x"}', "not a readable"), (None, "unknown model set 'other'")],
)
def test_damaged_record(tmp_path, catalog, opened, text, message):
    root = tmp_path / "comfy"
    write_manifest(root, Manifest("other", catalog.models["official"], "", {}), [])
    if text is not None:
        (root / "model-set.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        opened()


def test_tokenizer_beside_the_weights_comes_first(tmp_path, opened, empty_hub):
    named = put_tokenizer(tmp_path / "named")
    hub = empty_hub / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots"
    put_tokenizer(hub / "old" / "tokenizer")
    put_tokenizer(hub / "current" / "tokenizer")
    os.utime(hub / "current", (1, 1))
    put(hub.parent / "refs" / "main", content=b"current")
    assert opened().find_tokenizer() == hub / "current" / "tokenizer"
    assert opened(tokenizer=named).find_tokenizer() == named
    many = tmp_path / "comfy" / "models" / "tokenizers"
    put_tokenizer(many / "a-clip", chat=False)
    put_tokenizer(many / "qwen")
    assert opened(tokenizer=named).find_tokenizer() == many / "qwen"
    single = put_tokenizer(tmp_path / "comfy" / "tokenizer")
    assert opened(tokenizer=named).find_tokenizer() == single


def test_tokenizer_of_the_text_encoders_own_repository(opened, empty_hub):
    snapshot = empty_hub / "models--Qwen--Qwen3-4B" / "snapshots" / "abc"
    put(snapshot / "tokenizer_config.json", content=b"<|im_start|>")
    put(snapshot / "vocab.json")
    with pytest.raises(MissingFileError):
        opened().find_tokenizer()
    put(snapshot / "merges.txt")
    assert opened().find_tokenizer() == snapshot


def test_no_tokenizer_says_how_to_get_one(tmp_path, opened, empty_hub):
    with pytest.raises(MissingFileError) as caught:
        opened().find_tokenizer()
    assert str(tmp_path / "comfy" / "models" / "tokenizer") in caught.value.message
    assert str(empty_hub / "models--Tongyi-MAI--Z-Image-Turbo") in caught.value.message
    assert "hf download Tongyi-MAI/Z-Image-Turbo" in caught.value.mend


def test_named_tokenizer_must_do(tmp_path, opened, empty_hub):
    put_tokenizer(empty_hub / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots" / "x" / "tokenizer")
    (tmp_path / "named").mkdir()
    with pytest.raises(CheckpointError, match="no Qwen tokenizer there"):
        opened(tokenizer=tmp_path / "named").find_tokenizer()
    put_tokenizer(tmp_path / "named" / "tokenizer")
    assert opened(tokenizer=tmp_path / "named").find_tokenizer() == tmp_path / "named" / "tokenizer"


def test_a_synthetic_set_never_takes_a_real_tokenizer(opened, empty_hub):
    put_tokenizer(empty_hub / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots" / "x" / "tokenizer")
    with pytest.raises(MissingFileError):
        opened("synthetic-tiny").find_tokenizer()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HF_HOME": "/a/b"},
        {"HF_HUB_CACHE": "/a/c", "HF_HOME": "/a/b"},
        {"HUGGINGFACE_HUB_CACHE": "/a/d"},
        {"XDG_CACHE_HOME": "/a/e"},
        {"HF_HOME": "~/x"},
    ],
)
def test_hub_cache_is_where_the_hub_says(monkeypatch, environment):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = subprocess.run(
        [sys.executable, "-c", "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(hub_cache()) == asked.stdout.strip()


@pytest.mark.parametrize("size", [0, 100, 4 << 20, (4 << 20) + 1, 9_000_000])
def test_fingerprint_follows_the_contents(tmp_path, size):
    header = (64).to_bytes(8, "little") + b"{" + b" " * 63
    content = (header + os.urandom(max(0, size - len(header))))[:size]
    path = put(tmp_path / "x", content=content)
    before = file_fingerprint(path)
    assert before == file_fingerprint(put(tmp_path / "y", content=content))
    assert before != file_fingerprint(put(tmp_path / "z", content=content + b"\0"))
    for at in (0, 70, size - 1):
        if 0 <= at < size:
            changed = bytearray(content)
            changed[at] ^= 1
            assert file_fingerprint(put(tmp_path / "z", content=bytes(changed))) != before


def test_nothing_heavy_is_imported():
    code = (
        "import sys, pytest_zimage.checkpoints.modelset, pytest_zimage.checkpoints.formats\n"
        "print([name for name in ('torch', 'numpy', 'diffusers', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
