"""CLIPScore: the cosine of open_clip's image and text features.

The score is the cosine itself, as the published study prints it: not multiplied by 100 or 2.5 and not clamped at zero
as in Hessel et al. 2021 (https://arxiv.org/abs/2104.08718), so a negative cosine stays negative and stays visible.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
from msgspec import structs
from PIL import Image

from pytest_zimage.errors import CheckpointError, MissingFileError, UnsupportedError
from pytest_zimage.quality import tiny
from pytest_zimage.quality.checks import Pixels
from pytest_zimage.quality.protocol import TINY_CLIP, Scorer, ScorerChoice
from pytest_zimage.quality.weights import find_clip, load_safetensors, state_sha256

DEFAULT_ARCH = "ViT-B-32"
DEFAULT_TAG = "laion2b_s34b_b79k"

_TAG_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


class ClipScorer:
    """One open_clip model with its own preprocessing and tokenizer."""

    def __init__(
        self,
        model: torch.nn.Module,
        preprocess: Callable[[Image.Image], torch.Tensor],
        tokenizer: Any,
        device: torch.device,
        scorer: Scorer,
    ) -> None:
        self._model = model
        self._preprocess = preprocess
        self._tokenizer = tokenizer
        self._device = device
        self.scorer = scorer

    def image_features(self, images: Sequence[Pixels]) -> torch.Tensor:
        """Unit vectors `[n, features]` float32 on the host, of `[H, W, 3]` uint8 images."""
        batch = torch.stack([self._preprocess(Image.fromarray(pixels)) for pixels in images]).to(self._device)
        features: torch.Tensor = self._model.encode_image(batch, normalize=True)  # type: ignore[operator]
        return features.float().cpu()

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors `[n, features]` float32 on the host."""
        tokens = self._tokenizer(list(texts)).to(self._device)
        features: torch.Tensor = self._model.encode_text(tokens, normalize=True)  # type: ignore[operator]
        return features.float().cpu()

    def tokens_lost(self, text: str) -> int:
        """How many tokens of `text` the tokenizer cuts off, its start and end tokens counted."""
        return max(0, self._count(text) - int(self._tokenizer.context_length))

    def _count(self, text: str) -> int:
        if isinstance(self._tokenizer, open_clip.SimpleTokenizer):
            return len(self._tokenizer.encode(text)) + 2
        return len(self._tokenizer.tokenizer(self._tokenizer.clean_fn(text)).input_ids)


def open_clip_scorer(choice: ScorerChoice, device: torch.device) -> ClipScorer:
    """The CLIP model that `choice.clip` names, ready on `device`.

    Raises `UnsupportedError` for an architecture or tag open_clip does not have, `MissingFileError` for weights or a
    tokenizer that are not on this machine, `CheckpointError` for weights of another model.
    """
    if choice.clip == TINY_CLIP:
        return _open_tiny(device)
    arch, _, tag = choice.clip.partition(":")
    if arch not in open_clip.list_models():
        raise UnsupportedError(
            f"CLIP architecture {arch!r} is not known to open_clip {open_clip.__version__}", mend=_close(arch)
        )
    if not tag:
        if arch != DEFAULT_ARCH:
            raise UnsupportedError(f"{choice.clip}: which pretrained weights?", mend=_tags(arch))
        tag = DEFAULT_TAG
    if tag.endswith(".safetensors"):
        path = Path(tag)
        if not path.is_file():
            raise MissingFileError(f"CLIP weights of {arch}: {path} is not there", mend="check the path")
        return _load(arch, path.stem, path, {}, device)
    published = open_clip.get_pretrained_cfg(arch, tag)
    if not published:
        raise UnsupportedError(
            f"open_clip {open_clip.__version__} knows no weights {tag!r} of {arch}", mend=_tags(arch)
        )
    if published.get("quick_gelu", False) != open_clip.get_model_config(arch).get("quick_gelu", False):
        raise UnsupportedError(
            f"{arch}:{tag}: these weights were trained with QuickGELU and {arch} computes without, or the reverse, so "
            "its scores would be silently wrong",
            mend=f"use {arch}-quickgelu:{tag}, or another tag: {_tags(arch)}",
        )
    repository = published.get("hf_hub", "").rstrip("/")
    path = find_clip(arch, tag, repository, folder=choice.folder, allow_download=choice.allow_download)
    # open_clip takes these from the tag only when it finds the file by itself.
    preprocessing = {f"image_{key}": published[key] for key in _TAG_PREPROCESSING if key in published}
    return _load(arch, tag, path, preprocessing, device)


def _load(
    arch: str, tag: str, path: Path, preprocessing: dict[str, Any], device: torch.device, prefix: str = ""
) -> ClipScorer:
    stored = load_safetensors(path)
    wrong = "these are the weights of another model"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, preprocess = open_clip.create_model_from_pretrained(
                arch, pretrained=str(path), precision="fp32", device=device, **preprocessing
            )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: does not fit {arch}: {reason}", mend=wrong) from error
    state = model.state_dict()
    # open_clip resizes position embeddings to fit and says so in its log only.
    resized = [name for name, tensor in stored.items() if name in state and state[name].numel() != tensor.numel()]
    if resized:
        raise CheckpointError(f"{path}: {resized[0]} has another size than in {arch}", mend=wrong)
    try:
        tokenizer = open_clip.get_tokenizer(arch)
    except Exception as error:  # transformers raises OSError, ValueError or its own, by release
        raise MissingFileError(
            f"the tokenizer of {arch} cannot be had: {error}", mend=f"allow the download once, or use {DEFAULT_ARCH}"
        ) from error
    sha256 = state_sha256(state)
    scorer = Scorer(
        name="clip_score",
        identity=f"{prefix}open_clip/{arch}/{tag}@{sha256[:12]}",
        library=f"open_clip_torch {version('open_clip_torch')}",
        weights_sha256=sha256,
        source=str(path),
    )
    return ClipScorer(model.eval(), preprocess, tokenizer, device, scorer)


def _open_tiny(device: torch.device) -> ClipScorer:
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.write_clip(Path(folder))
        opened = _load(tiny.CLIP_ARCH, tiny.SEED_NAME, path, {}, device, prefix="tiny-")
    # The file was made for this moment only; its recipe is where the weights come from.
    opened.scorer = structs.replace(opened.scorer, source="seeded values")
    return opened


def _tags(arch: str) -> str:
    return f"open_clip knows {', '.join(open_clip.list_pretrained_tags_by_model(arch)) or 'none'}"


def _close(arch: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(arch, open_clip.list_models(), n=3)
    return f"did you mean {', '.join(near)}?" if near else "see open_clip.list_models()"
