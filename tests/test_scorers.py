"""CLIPScore, LPIPS, PSNR and SSIM are what their libraries give for the same files, and say which weights they used."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import lpips
import numpy as np
import open_clip
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import CheckpointError, MeasurementError, MissingFileError, UnsupportedError
from pytest_zimage.quality import tiny, weights
from pytest_zimage.quality.clip import open_clip_scorer
from pytest_zimage.quality.lpips import open_lpips_scorer
from pytest_zimage.quality.pixels import compare_pixels
from pytest_zimage.quality.protocol import Item, ScorerChoice
from pytest_zimage.quality.scoring import Scoring

CPU = torch.device("cpu")
PROMPTS = load_catalog().prompt_set("quality-6x3").prompts
REPOSITORY = "someone/ViT-test"
TAG = "some_tag"
MEAN = (0.1, 0.2, 0.3)
"""Not open_clip's default: a tag's own preprocessing must be used with a file found by us."""


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Four pictures of 96x80: soft shapes of their own colours and a little grain."""
    folder = tmp_path_factory.mktemp("images")
    y, x = np.mgrid[0:80, 0:96] / 16.0
    paths = []
    for seed in range(4):
        random = np.random.RandomState(seed)
        shapes = [np.sin(x * random.rand() * 3 + seed) * np.cos(y * random.rand() * 3) for _ in range(3)]
        pixels = 128 + 90 * np.stack(shapes, axis=2) + random.normal(0, 6, (80, 96, 3))
        paths.append(folder / f"{seed}.png")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path))


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """A small architecture with a published tag, and its weights in a hub cache of its own; the path of the weights."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "ViT-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "ViT-test.json")
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED,
        "ViT-test",
        {
            TAG: {"hf_hub": f"{REPOSITORY}/", "mean": MEAN, "interpolation": "bilinear", "resize_mode": "squash"},
            "quick": {"hf_hub": f"{REPOSITORY}/", "quick_gelu": True},
            "pickled": {"url": "https://example.org/weights.pt", "hf_hub": ""},
        },
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(7)
    path = snapshot / "open_clip_model.safetensors"
    save_file({name: value.clone() for name, value in open_clip.create_model("ViT-test").state_dict().items()}, path)
    return path


CHOICE = ScorerChoice(clip=f"ViT-test:{TAG}")


class Direct:
    """What anyone would write with open_clip alone."""

    def __init__(self, arch: str, path, **more):
        self.model, self.preprocess = open_clip.create_model_from_pretrained(arch, pretrained=str(path), **more)
        self.tokenizer = open_clip.get_tokenizer(arch)

    def score(self, path, text: str) -> float:
        image = self.model.encode_image(self.preprocess(Image.open(path)).unsqueeze(0))
        words = self.model.encode_text(self.tokenizer([text]))
        return torch.nn.functional.cosine_similarity(image, words).item()


# ---- CLIPScore -----------------------------------------------------------


def assert_scores_are_direct(scorer, direct, images):
    texts = [prompt.text for prompt in PROMPTS[1:5]]
    items = [Item("p", text, 1, str(path)) for path, text in zip(images, texts, strict=True)]
    scores = Scoring(scorer, None).score(items, lambda *_: None)
    for item, score in zip(items, scores, strict=True):
        assert score.clip_score == pytest.approx(direct.score(item.path, item.text), abs=1e-6)
    assert max(s.clip_score for s in scores) - min(s.clip_score for s in scores) > 0.01


def test_tiny_clip_score_is_open_clips(images, tmp_path):
    direct = Direct(tiny.CLIP_ARCH, tiny.write_clip(tmp_path))
    assert_scores_are_direct(open_clip_scorer(ScorerChoice(), CPU), direct, images)


def test_clip_score_from_the_hubs_cache_is_open_clips(published, images):
    scorer = open_clip_scorer(CHOICE, CPU)
    more = {"image_mean": MEAN, "image_interpolation": "bilinear", "image_resize_mode": "squash"}
    assert_scores_are_direct(scorer, Direct("ViT-test", published, **more), images)
    assert scorer.scorer.source == str(published)
    assert scorer.scorer.identity.startswith(f"open_clip/ViT-test/{TAG}@")
    assert scorer.scorer.library == f"open_clip_torch {open_clip.__version__}"


def test_negative_scores_stay_negative(images):
    clip = open_clip_scorer(ScorerChoice(), CPU)
    direction = clip.image_features([pixels(images[0])])[0]
    clip.text_features = lambda texts: -direction.repeat(len(texts), 1)
    (score,) = Scoring(clip, None).score([Item("p", "t", 1, str(images[0]))], lambda *_: None)
    assert score.clip_score == pytest.approx(-1.0, abs=1e-6)


def test_the_identity_follows_the_weights(published):
    first = open_clip_scorer(CHOICE, CPU).scorer
    state = load_file(published)
    state["text_projection"][0, 0] += 1e-3
    save_file(state, published)
    second = open_clip_scorer(CHOICE, CPU).scorer
    assert first.identity != second.identity
    assert first.weights_sha256[:12] in first.identity


def test_tiny_scorers_have_the_same_weights_everywhere():
    """Portable baselines hold their scores; a change of the recipe must be meant."""
    assert open_clip_scorer(ScorerChoice(), CPU).scorer.identity == "tiny-open_clip/ViT-tiny-16/seed-1@842e4a857e8c"
    assert open_lpips_scorer(ScorerChoice(), CPU).scorer.identity == "tiny-lpips/alex-v0.1@5ea7b86319c3"


def test_a_folder_comes_before_the_cache(published, tmp_path):
    mine = tmp_path / "mine" / f"ViT-test-{TAG}.safetensors"
    mine.parent.mkdir()
    mine.write_bytes(published.read_bytes())
    choice = ScorerChoice(clip=CHOICE.clip, folder=str(mine.parent))
    assert open_clip_scorer(choice, CPU).scorer.source == str(mine)


def test_a_file_by_its_path(published):
    scorer = open_clip_scorer(ScorerChoice(clip=f"ViT-test:{published}"), CPU).scorer
    assert scorer.identity.startswith("open_clip/ViT-test/open_clip_model@")
    with pytest.raises(MissingFileError, match=r"/nowhere.safetensors is not there"):
        open_clip_scorer(ScorerChoice(clip="ViT-test:/nowhere.safetensors"), CPU)


def test_missing_weights_name_everything_searched(published, tmp_path):
    published.unlink()
    choice = ScorerChoice(clip=CHOICE.clip, folder=str(tmp_path))
    with pytest.raises(MissingFileError) as caught:
        open_clip_scorer(choice, CPU)
    assert f"CLIP weights of ViT-test:{TAG} not found" in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert f"{tmp_path / 'hub'} ({REPOSITORY})" in caught.value.message
    assert f"hf download {REPOSITORY} open_clip_model.safetensors" in caught.value.mend
    assert "tiny-clip" in caught.value.mend


def test_the_default_is_named_by_its_repository(published):
    with pytest.raises(
        MissingFileError, match=r"ViT-B-32:laion2b_s34b_b79k(.|\n)*laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    ):
        open_clip_scorer(ScorerChoice(clip="ViT-B-32"), CPU)


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickled_clip_weights_are_refused_unread(published, tmp_path):
    published.unlink()
    mark = tmp_path / "unpickled"
    (published.parent / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(MissingFileError, match=r"open_clip_pytorch_model.bin is there, but it is a pickle"):
        open_clip_scorer(CHOICE, CPU)
    with pytest.raises(UnsupportedError, match="ViT-test:pickled is published as a pickle only"):
        open_clip_scorer(ScorerChoice(clip="ViT-test:pickled"), CPU)
    assert not mark.exists()


def test_quick_gelu_weights_in_a_plain_model_are_refused(published):
    with pytest.raises(UnsupportedError, match=r"trained with QuickGELU(.|\n)*ViT-test-quickgelu:quick"):
        open_clip_scorer(ScorerChoice(clip="ViT-test:quick"), CPU)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("ViT-B-23:x", r"'ViT-B-23' is not known to open_clip(.|\n)*did you mean"),
        ("ViT-B-32:laion9b", r"no weights 'laion9b' of ViT-B-32(.|\n)*laion2b_s34b_b79k"),
        ("ViT-L-14", r"which pretrained weights\?(.|\n)*laion2b_s32b_b82k"),
    ],
)
def test_names_that_are_none(clip, message):
    with pytest.raises(UnsupportedError, match=message):
        open_clip_scorer(ScorerChoice(clip=clip), CPU)


def _drop(state):
    del state["visual.proj"]


def _rename(state):
    state["visual.projection"] = state.pop("visual.proj")


def _other_shape(state):
    state["text_projection"] = torch.zeros(32, 16)


def _other_image_size(state):
    state["visual.positional_embedding"] = torch.zeros(1 + 36, 32)


@pytest.mark.parametrize("damage", [_drop, _rename, _other_shape, _other_image_size])
def test_weights_of_another_model(published, damage):
    state = load_file(published)
    damage(state)
    save_file(state, published)
    with pytest.raises(CheckpointError, match=r"open_clip_model.safetensors: (.|\n)*weights of another model"):
        open_clip_scorer(CHOICE, CPU)


def test_weights_cut_short(published):
    published.write_bytes(published.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"open_clip_model.safetensors: cannot be read as safetensors"):
        open_clip_scorer(CHOICE, CPU)


def test_nan_weights_name_image_and_scorer(published, images):
    state = load_file(published)
    state["visual.proj"][:] = float("nan")
    save_file(state, published)
    scoring = Scoring(open_clip_scorer(CHOICE, CPU), None)
    with pytest.raises(MeasurementError, match=rf"0.png: open_clip/ViT-test/{TAG}@\w+ gave nan"):
        scoring.score([Item("p", "t", 1, str(images[0]))], lambda *_: None)


def test_tokens_beyond_the_limit_are_counted(published, images):
    clip = open_clip_scorer(CHOICE, CPU)
    assert clip.tokens_lost("cat " * 18) == 0
    assert clip.tokens_lost("cat " * 23) == 5
    item = Item("p", "cat " * 23, 1, str(images[0]))
    assert Scoring(clip, None).score([item], lambda *_: None)[0].tokens_lost == 5


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.name)
def test_the_studys_prompts_fit_into_77_tokens(prompt):
    assert open_clip_scorer(ScorerChoice(), CPU).tokens_lost(prompt.text) == 0


# ---- LPIPS ---------------------------------------------------------------


def direct_lpips(backbone) -> lpips.LPIPS:
    """What anyone would write with lpips alone, its shipped linear layers read its own way."""
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    slices = (network.net.slice1, network.net.slice2, network.net.slice3, network.net.slice4, network.net.slice5)
    for part, index in zip(slices, (0, 3, 6, 8, 10), strict=True):
        convolution = getattr(part, str(index))
        convolution.weight.copy_(backbone[f"features.{index}.weight"])
        convolution.bias.copy_(backbone[f"features.{index}.bias"])
    return network


def assert_distances_are_direct(scorer, network, images):
    pairs = [(images[0], images[1]), (images[2], images[3]), (images[1], images[1])]
    items = [Item("p", "t", 1, str(one), reference=str(other)) for one, other in pairs]
    scores = Scoring(None, scorer).score(items, lambda *_: None)
    for (one, other), score in zip(pairs, scores, strict=True):
        direct = network(lpips.im2tensor(pixels(one)), lpips.im2tensor(pixels(other))).item()
        assert score.against.lpips == pytest.approx(direct, abs=1e-6)
        assert score.clip_score is None
    assert scores[0].against.lpips > 0.05
    assert scores[2].against.lpips == 0


def test_tiny_lpips_is_lpips(images):
    assert_distances_are_direct(open_lpips_scorer(ScorerChoice(), CPU), direct_lpips(tiny.alexnet()), images)


@pytest.fixture
def alexnet(tmp_path) -> Path:
    """torchvision's AlexNet with random weights, converted as the mend says."""
    torch.manual_seed(3)
    path = tmp_path / "scorers" / "alexnet-owt-7be5be79.safetensors"
    path.parent.mkdir()
    save_file(torchvision.models.alexnet().state_dict(), path)
    return path


def test_lpips_from_a_folder_is_lpips(alexnet, images):
    scorer = open_lpips_scorer(ScorerChoice(lpips="alex", folder=str(alexnet.parent)), CPU)
    assert_distances_are_direct(scorer, direct_lpips(load_file(alexnet)), images)
    assert scorer.scorer.identity.startswith("lpips/alex-v0.1@")
    assert scorer.scorer.source == str(alexnet)


def test_alexnet_beside_torchs_cache(alexnet, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    alexnet.parent.rename(tmp_path / "hub" / "checkpoints")
    scorer = open_lpips_scorer(ScorerChoice(lpips="alex"), CPU).scorer
    assert scorer.source == str(tmp_path / "hub" / "checkpoints" / alexnet.name)


def test_a_pickled_alexnet_is_refused_unread_and_the_conversion_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    mark = tmp_path / "unpickled"
    pickled = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    pickled.parent.mkdir()
    pickled.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(MissingFileError) as caught:
        open_lpips_scorer(ScorerChoice(lpips="alex"), CPU)
    assert f"{pickled} is there, but it is a pickle and is not read" in caught.value.message
    assert "s.save_file(torch.load(" in caught.value.mend
    assert not mark.exists()


def test_the_conversion_shown_works(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    pickled = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    pickled.parent.mkdir()
    torch.save(torchvision.models.alexnet().state_dict(), pickled)
    with pytest.raises(MissingFileError) as caught:
        open_lpips_scorer(ScorerChoice(lpips="alex"), CPU)
    command = caught.value.mend.split('python -c "')[1].split('"')[0]
    exec(command)
    assert open_lpips_scorer(ScorerChoice(lpips="alex"), CPU).scorer.source == str(pickled.with_suffix(".safetensors"))


def test_an_alexnet_that_is_none(alexnet):
    state = load_file(alexnet)
    save_file({**state, "features.3.weight": torch.zeros(192, 64, 3, 3)}, alexnet)
    choice = ScorerChoice(lpips="alex", folder=str(alexnet.parent))
    with pytest.raises(CheckpointError, match=r"alexnet-owt-7be5be79.safetensors: is no AlexNet"):
        open_lpips_scorer(choice, CPU)
    save_file({name: value for name, value in state.items() if name != "features.8.bias"}, alexnet)
    with pytest.raises(CheckpointError, match=r"features\.8\.bias is missing"):
        open_lpips_scorer(choice, CPU)


def test_other_linear_layers_are_refused(monkeypatch, tmp_path):
    folder = tmp_path / "weights" / "v0.1"
    folder.mkdir(parents=True)
    shipped = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
    data = bytearray(shipped.read_bytes())
    data[5000] ^= 1
    (folder / "alex.pth").write_bytes(data)
    monkeypatch.setattr(lpips, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UnsupportedError, match=r"alex.pth: is not the file this reader knows(.|\n)*lpips 0.1.4"):
        open_lpips_scorer(ScorerChoice(), CPU)


def test_an_unknown_network():
    with pytest.raises(UnsupportedError, match=r"no network 'vgg' here(.|\n)*alex or tiny-alex"):
        open_lpips_scorer(ScorerChoice(lpips="vgg"), CPU)


def test_tiny_lpips_grows_with_the_damage(images):
    scorer = open_lpips_scorer(ScorerChoice(), CPU)
    whole = pixels(images[0])
    random = np.random.RandomState(0)
    noisy = [
        (whole + random.normal(0, share * 255, whole.shape)).clip(0, 255).astype(np.uint8)
        for share in (0.01, 0.05, 0.2)
    ]
    distances = scorer.distances([*noisy, np.zeros_like(whole)], [whole] * 4)
    assert distances[0] < distances[1] < distances[2]
    assert distances[1] > 0.02, "noise of 5 % must be more than the gate's margin"
    assert distances[3] > 0.1


# ---- PSNR and SSIM -------------------------------------------------------


def test_psnr_and_ssim_are_scikit_images(images):
    one, other = pixels(images[0]), pixels(images[1])
    seen = compare_pixels("a", one, "b", other)
    assert seen.psnr_db == peak_signal_noise_ratio(other, one, data_range=255)
    assert seen.ssim == structural_similarity(other, one, win_size=11, channel_axis=-1, data_range=255)
    assert (seen.identical, seen.lpips) == (False, None)


def test_one_step_in_one_channel_is_seen(images):
    one = pixels(images[0])
    other = one.copy()
    other[3, 4, 1] ^= 1
    seen = compare_pixels("a", other, "b", one)
    assert (seen.identical, seen.changed_share, seen.largest_step) == (False, 1 / (80 * 96), 1)
    same = compare_pixels("a", one, "b", one.copy())
    assert (same.identical, same.psnr_db, same.ssim, same.changed_share) == (True, None, 1.0, 0.0)


def test_images_that_cannot_be_compared():
    large, small = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 32, 3), np.uint8)
    with pytest.raises(MeasurementError, match=r"new.png: it is 32x64, its reference bf16.png is 64x64"):
        compare_pixels("new.png", small, "bf16.png", large)
    with pytest.raises(MeasurementError, match=r"new.png: 10x10 is smaller than SSIM's window of 11"):
        compare_pixels("new.png", large[:10, :10], "bf16.png", large[:10, :10])


@pytest.mark.parametrize(("side", "works"), [(34, False), (35, True)])
def test_images_too_small_for_lpips(tmp_path, side, works):
    path = tmp_path / "small.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (side, 96, 3), dtype=np.uint8)).save(path)
    scoring = Scoring(None, open_lpips_scorer(ScorerChoice(), CPU))
    item = Item("p", "t", 1, str(path), reference=str(path))
    if works:
        assert scoring.score([item], lambda *_: None)[0].against.lpips == 0
    else:
        with pytest.raises(MeasurementError, match=r"small.png: 96x34 is too small for LPIPS"):
            scoring.score([item], lambda *_: None)


def test_state_hashes_depend_on_names_types_shapes_and_bytes():
    base = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    same = {"b": torch.zeros(2), "a": torch.arange(6.0)}
    others = [
        {**base, "b": torch.zeros(2).half()},
        {**base, "a": torch.arange(6.0).reshape(2, 3)},
        {**base, "a": torch.arange(6.0) + 1},
        {"a": base["a"], "c": base["b"]},
    ]
    assert weights.state_sha256(base) == weights.state_sha256(same)
    assert len({weights.state_sha256(state) for state in [base, *others]}) == 5
