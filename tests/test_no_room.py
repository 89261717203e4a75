"""Too little disk for the full-size set: said, with the amount, before anything is written."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints.synthetic import set_dims
from pytest_zimage.errors import CheckpointError

NAME = "synthetic-full"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files of the full-size set to a disk with so many bytes left; a weight that is made is an error."""
    import torch

    from pytest_zimage.checkpoints.synthetic import build, writer

    def never(*args, **keywords):
        raise AssertionError("a weight was made")

    def writing(free_bytes: int, *files: str) -> Path:
        usage = shutil.disk_usage(tmp_path)._replace(free=free_bytes)
        monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
        monkeypatch.setattr(writer, "make_weight", never)
        dims = set_dims(NAME, load_catalog())
        root = tmp_path / NAME
        build.build_model_set(NAME, dims, root, files or None, device=torch.device("cpu"), say=lambda line: None)
        return root

    return writing


def on_disk(folder: Path) -> int:
    return sum((Path(at) / name).stat().st_size for at, _, names in os.walk(folder) for name in names)


def test_the_whole_set_is_refused_with_both_amounts(write, tmp_path):
    with pytest.raises(CheckpointError, match=r"need (\d+\.\d+) GB and the disk has 30\.00 GB left") as caught:
        write(30_000_000_000)
    needed = float(re.search(r"need ([\d.]+) GB", caught.value.message)[1])
    assert 36 < needed < 39, "six variants at full size"
    assert str(tmp_path / NAME) in caught.value.message
    assert "free some space" in caught.value.mend
    assert on_disk(tmp_path) == 0


def test_only_what_a_variant_needs_is_asked_for(write, tmp_path):
    with pytest.raises(CheckpointError, match=r"need 12\.\d+ GB and the disk has 5\.00 GB left"):
        write(5_000_000_000, "z_image_turbo_bf16.safetensors")
    assert on_disk(tmp_path) == 0


def test_with_room_it_would_be_written(write):
    """The guard of the two tests above: the same call gets as far as making weights."""
    with pytest.raises(AssertionError, match="a weight was made"):
        write(60_000_000_000, "z_image_turbo_bf16.safetensors")
