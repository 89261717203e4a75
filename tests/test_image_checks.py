"""Files that hold no picture are caught by their pixels alone; pictures pass."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from pytest_zimage.catalog import ROLE_FOLDERS, load_catalog
from pytest_zimage.engines.diffusers_engine import DiffusersEngine
from pytest_zimage.engines.protocol import DrawImages, ImageJob, Load
from pytest_zimage.errors import MeasurementError, MissingFileError
from pytest_zimage.quality.checks import inspect
from pytest_zimage.quality.images import pixels_sha256, read_image
from pytest_zimage.quality.limits import load_limits

LIMITS = load_limits().image
SIDE = 96


def found(pixels: np.ndarray) -> set[str]:
    return {finding.check for finding in inspect(pixels.clip(0, 255).astype(np.uint8), LIMITS)}


def flat(*colour: float) -> np.ndarray:
    return np.broadcast_to(np.array(colour, float), (SIDE, SIDE, 3)).copy()


def grain(std: float) -> np.ndarray:
    return np.random.RandomState(0).normal(0, std, (SIDE, SIDE, 3))


def picture() -> np.ndarray:
    y, x = np.mgrid[0:SIDE, 0:SIDE] / 12.0
    shapes = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=2)
    return 128 + 60 * shapes + grain(5)


# ---- what must pass ------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tiny, tmp_path_factory):
    """Images of the tiny model, of a plain variant and of the one that is quantised most."""
    catalog, folder = load_catalog(), tmp_path_factory.mktemp("drawn")
    images = []
    for name in ("bf16", "nvfp4-fp8e"):
        variant = catalog.variant(name)
        files = {role: str(tiny / ROLE_FOLDERS[role][0] / file) for role, file in variant.files().items()}
        engine = DiffusersEngine()
        workload = catalog.workload("turbo-tiny")
        engine.load(
            Load(variant, workload, catalog.models["synthetic-tiny"], files, str(tiny / "tokenizer"), "cpu"),
        )
        jobs = tuple(ImageJob("p", "a red fox", seed, str(folder / f"{name}-{seed}.png")) for seed in (42, 7777))
        images += engine.draw_images(DrawImages(jobs, 128, 128), lambda *_: None).images
    return images


def test_images_of_the_tiny_model_pass_and_keep_their_fingerprint(drawn):
    for image in drawn:
        pixels = read_image(image.path, sha256=image.pixels_sha256, size=(128, 128))
        assert inspect(pixels, LIMITS) == ()


def white_paper() -> np.ndarray:
    """An ink drawing: two thirds pure white, dark strokes, soft edges."""
    image = flat(255, 255, 255)
    image[SIDE // 3 : 2 * SIDE // 3] = 60 + np.linspace(0, 190, SIDE)[:, None] + grain(6)[: SIDE // 3]
    image[:, : SIDE // 8] -= np.abs(grain(3))[:, : SIDE // 8]
    return image


def cinema_bars() -> np.ndarray:
    image = picture()
    image[: SIDE // 8] = image[-SIDE // 8 :] = 0
    return image


@pytest.mark.parametrize(
    "image",
    [picture(), white_paper(), cinema_bars(), flat(200, 205, 210) + grain(9), picture() * 0.15, grain(80) + 128],
    ids=["picture", "ink on white paper", "cinema bars", "fog", "night", "noise, which other gates catch"],
)
def test_pictures_pass(image):
    assert found(image) == set()


# ---- what must be caught -------------------------------------------------


def nan_cast() -> np.ndarray:
    """What a decoder full of NaN leaves after clamping and the cast to uint8."""
    values = np.full((SIDE, SIDE, 3), np.nan)
    return np.nan_to_num(values)


def clipped() -> np.ndarray:
    """Latents far too large: nearly every value at one of the ends."""
    return (picture() - 128) * 30 + 128


def half_nan() -> np.ndarray:
    image = picture()
    image[SIDE // 2 :] = 0
    return image


def mostly_black() -> np.ndarray:
    image = np.zeros((SIDE, SIDE, 3))
    image[:, :: SIDE // 6] = picture()[:, :: SIDE // 6]
    return image


@pytest.mark.parametrize(
    ("image", "checks"),
    [
        (nan_cast(), {"uniform", "few-colours", "black", "saturated", "flat-rows", "flat-columns"}),
        (flat(255, 255, 255), {"uniform", "few-colours", "saturated", "flat-rows", "flat-columns"}),
        (flat(118, 120, 122), {"uniform", "few-colours", "flat-rows", "flat-columns"}),
        (flat(118, 120, 122) + grain(1.5), {"uniform"}),
        (clipped(), {"saturated"}),
        (np.where(picture() > 128, 200.0, 60.0), {"few-colours"}),
        (half_nan(), {"flat-rows"}),
        (half_nan().transpose(1, 0, 2), {"flat-columns"}),
        (mostly_black(), {"black", "saturated", "flat-columns"}),
    ],
    ids=["NaN", "white", "grey", "grey with grain", "clipped", "8 colours", "half rows", "half columns", "black"],
)
def test_no_pictures_are_caught(image, checks):
    assert checks <= found(image)
    if len(checks) == 1:
        assert checks == found(image)


def test_a_finding_gives_number_and_limit():
    (finding,) = inspect((flat(118, 120, 122) + grain(1.5)).astype(np.uint8), LIMITS)
    assert finding.message.startswith("every channel is flat around (117, 119, 121): std 1.")
    assert finding.message.endswith("at least 4")


def test_each_limit_is_the_one_that_decides():
    image = picture().clip(0, 255).astype(np.uint8)
    stricter = {
        "uniform": {"min_std": 200.0},
        "few-colours": {"min_colours": 1 << 20},
        "black": {"max_black_share": -1.0},
        "saturated": {"max_saturated_share": -1.0},
    }
    for check, change in stricter.items():
        assert [finding.check for finding in inspect(image, replace(LIMITS, **change))] == [check]


# ---- files ---------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(picture().clip(0, 255).astype(np.uint8)).save(path)
    return path


def test_a_sound_file_is_read_as_it_was_written(saved):
    pixels = read_image(str(saved))
    assert pixels.shape == (SIDE, SIDE, 3)
    assert np.array_equal(pixels, read_image(str(saved), sha256=pixels_sha256(pixels), size=(SIDE, SIDE)))


def test_a_missing_file(tmp_path):
    with pytest.raises(MissingFileError, match=r"gone.png: the image is not there"):
        read_image(str(tmp_path / "gone.png"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.99])
def test_a_file_cut_short(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(MeasurementError, match=r"image.png: cannot be read as an image"):
        read_image(str(saved))


def test_a_flipped_bit_in_the_data(saved):
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 0x10
    saved.write_bytes(data)
    with pytest.raises(MeasurementError, match=r"image.png: cannot be read as an image"):
        read_image(str(saved))


def test_a_text_file_named_png(saved):
    saved.write_text("not an image")
    with pytest.raises(MeasurementError, match=r"image.png: cannot be read as an image"):
        read_image(str(saved))


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_other_pixels_than_rgb(saved, mode):
    Image.open(saved).convert(mode).save(saved)
    with pytest.raises(MeasurementError, match=rf"image.png: its pixels are {mode}, not RGB"):
        read_image(str(saved))


def test_another_size_than_asked_for(saved):
    with pytest.raises(MeasurementError, match=r"image.png: it is 96x96 where 128x64 was asked for"):
        read_image(str(saved), size=(128, 64))


def test_other_pixels_than_drawn(saved):
    with pytest.raises(MeasurementError, match=r"image.png: its pixels hash to \w{12}, but 000000000000 was drawn"):
        read_image(str(saved), sha256="0" * 64)
