"""Images are saved while the next one is drawn: none is told before it is on the disk, and none is lost."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pytest_zimage.engines import keeping
from pytest_zimage.engines.drawing import digest
from pytest_zimage.engines.keeping import Keeper
from pytest_zimage.engines.protocol import ImageJob


def pixels(value: int) -> torch.Tensor:
    return torch.full((4, 6, 3), value, dtype=torch.uint8)


def job(folder: Path, seed: int) -> ImageJob:
    return ImageJob("pier", "a pier", seed, str(folder / f"{seed}.png"))


def test_keeps_every_image_in_the_order_drawn(tmp_path: Path) -> None:
    with Keeper() as keeper:
        for seed in range(3):
            keeper.keep(job(tmp_path, seed), pixels(seed))
    assert [(image.seed, image.pixels_sha256) for image in keeper.kept] == [(n, digest(pixels(n))) for n in range(3)]
    for image in keeper.kept:
        assert Image.open(image.path).getpixel((5, 3)) == (image.seed,) * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]


def test_does_not_wait_for_an_image_until_the_next_and_tells_it_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, write_png = threading.Event(), keeping.write_png

    def once_let(image: NDArray[np.uint8], path: Path) -> None:
        slow.wait()
        write_png(image, path)

    monkeypatch.setattr(keeping, "write_png", once_let)
    with Keeper() as keeper:
        keeper.keep(job(tmp_path, 0), pixels(0))
        assert keeper.kept == ()
        slow.set()
        keeper.keep(job(tmp_path, 1), pixels(1))
        assert [image.seed for image in keeper.kept] == [0]
    assert [image.seed for image in keeper.kept] == [0, 1]


def keep(folders: list[Path], error: Exception | None = None) -> None:
    with Keeper() as keeper:
        for seed, folder in enumerate(folders):
            keeper.keep(job(folder, seed), pixels(seed))
        if error is not None:
            raise error


@pytest.mark.parametrize("place", [0, 1])
def test_an_image_that_could_not_be_saved_ends_the_drawing(tmp_path: Path, place: int) -> None:
    folders = [tmp_path, tmp_path]
    folders[place] = tmp_path / "gone"
    with pytest.raises(FileNotFoundError):
        keep(folders)


def test_an_error_while_drawing_stays_the_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="drawing"):
        keep([tmp_path / "gone"], KeyError("drawing"))
