"""What the test process and the judge say to each other: one JSON object a line, typed on both sides.

`Progress`, `Failure`, `Close` and `Closed` are those of the engines' workers. Scores are plain numbers: a CLIPScore is
a cosine, -1 to 1; LPIPS is 0 for equal images and grows with their distance; PSNR is in dB; SSIM is at most 1. Nothing
here imports torch.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from pytest_zimage.engines.protocol import Close, Closed, Failure, Progress

ScorerName = Literal["clip_score", "lpips", "psnr_db", "ssim"]

TINY_CLIP = "tiny-clip"
TINY_LPIPS = "tiny-alex"


class ScorerChoice(Struct, frozen=True):
    """Which scorers judge."""

    clip: str = TINY_CLIP
    """`ARCH:PRETRAINED` in open_clip's words (`ViT-B-32:laion2b_s34b_b79k`; a tag or a safetensors file), `ViT-B-32`
    for that very pair, `tiny-clip`, or empty: no CLIPScore."""
    lpips: str = TINY_LPIPS
    """`alex`, `tiny-alex`, or empty: no LPIPS."""
    folder: str = ""
    """A folder of scorer weights, searched before the caches."""
    allow_download: bool = False
    """Whether the hub may be asked for what is nowhere on this machine."""


class Scorer(Struct, frozen=True):
    """One scorer as it was opened. Scores of two identities must never be compared."""

    name: ScorerName
    identity: str
    """Library, architecture and, where it has weights, twelve digits of their hash."""
    library: str
    """Package and version."""
    weights_sha256: str = ""
    """Over the names, types, shapes and bytes of all weights; empty for a formula."""
    source: str = ""
    """Where the weights came from."""


class Item(Struct, frozen=True):
    """One image to score."""

    prompt: str
    """The prompt's name in its set."""
    text: str
    seed: int
    path: str
    pixels_sha256: str = ""
    """Of the decoded pixels, as the image's maker reported it; empty: not checked."""
    reference: str = ""
    """The image to compare with (bf16, same prompt and seed); empty: no LPIPS, PSNR and SSIM."""
    reference_sha256: str = ""
    size: tuple[int, int] | None = None
    """Width and height it must have; None: not checked."""


class PathPair(Struct, frozen=True):
    """Two images of the same prompt and seed: what is judged and what it is held against."""

    path: str
    reference: str
    pixels_sha256: str = ""
    reference_sha256: str = ""


class ControlPrompt(Struct, frozen=True):
    """One prompt with the images that were drawn for it."""

    prompt: str
    text: str
    paths: tuple[str, ...]


class PreviewJob(Struct, frozen=True):
    """One preview to make; `target` ends in `.webp`, `.jpg` or `.png`, and its folder exists."""

    path: str
    target: str


# ---- requests ------------------------------------------------------------


class Open(Struct, frozen=True, tag=True):
    """Load the scorers."""

    choice: ScorerChoice
    threads: int = 0
    """How many CPU threads scoring may use; 0: as many as torch chooses, and no more than eight."""


class ScoreImages(Struct, frozen=True, tag=True):
    items: tuple[Item, ...]


class ScoreControls(Struct, frozen=True, tag=True):
    """Score the real images of each prompt, and what must lose against them."""

    prompts: tuple[ControlPrompt, ...]
    noise_seed: int = 0


class ComparePairs(Struct, frozen=True, tag=True):
    pairs: tuple[PathPair, ...]


class MakePreviews(Struct, frozen=True, tag=True):
    jobs: tuple[PreviewJob, ...]
    limit_bytes: int
    side: int
    """Longest side to begin with, in pixels."""


Request = Open | ScoreImages | ScoreControls | ComparePairs | MakePreviews | Close

# ---- replies -------------------------------------------------------------


class Ready(Struct, frozen=True, tag=True):
    """The scorers are loaded."""

    pid: int
    import_s: float
    load_s: float
    scorers: tuple[Scorer, ...]
    environment: dict[str, str]

    def identity(self, name: ScorerName) -> str:
        """The identity of the scorer `name`; empty if it was not asked for."""
        return next((scorer.identity for scorer in self.scorers if scorer.name == name), "")


class Finding(Struct, frozen=True):
    """Something that no image should show, whatever a scorer thinks of it."""

    check: str
    """`uniform`, `few-colours`, `black`, `saturated`, `flat-rows` or `flat-columns`."""
    message: str


class Comparison(Struct, frozen=True):
    """How far an image is from its reference."""

    identical: bool
    """Every pixel is equal."""
    lpips: float | None
    """None only when LPIPS was not asked for."""
    psnr_db: float | None
    """None only for identical images, whose PSNR is infinite."""
    ssim: float
    changed_share: float
    """Share of pixels that differ in any channel, 0 to 1."""
    largest_step: int
    """Largest difference of one channel of one pixel, 0 to 255."""


class ImageScore(Struct, frozen=True):
    """What is known of one image."""

    prompt: str
    seed: int
    path: str
    pixels_sha256: str
    """Computed from the file; the fingerprint."""
    clip_score: float | None
    """None only when CLIPScore was not asked for. A cosine, neither scaled nor clamped: negatives stay negative."""
    tokens_lost: int
    """How many tokens of the text did not fit into the text encoder and were not judged."""
    against: Comparison | None
    """Against the item's reference; None without one."""
    findings: tuple[Finding, ...]


class Scored(Struct, frozen=True, tag=True):
    """In the order of the items."""

    images: tuple[ImageScore, ...]


class ControlScores(Struct, frozen=True):
    """CLIPScores of one prompt's own images and of what must lose against them, all with the prompt's text."""

    prompt: str
    real: tuple[float, ...]
    black: tuple[float, ...]
    """One score for each size among the real images."""
    noise: tuple[float, ...]
    other: tuple[float, ...]
    """Scores of the images of `other_prompt`, the next one of the set; empty in a set of one prompt."""
    other_prompt: str


class ControlsScored(Struct, frozen=True, tag=True):
    """In the order of the prompts."""

    prompts: tuple[ControlScores, ...]


class Compared(Struct, frozen=True, tag=True):
    """In the order of the pairs."""

    pairs: tuple[Comparison, ...]


class Preview(Struct, frozen=True):
    """One preview as it was written."""

    target: str
    width: int
    height: int
    bytes: int


class PreviewsMade(Struct, frozen=True, tag=True):
    """In the order of the jobs."""

    previews: tuple[Preview, ...]


Reply = Ready | Scored | ControlsScored | Compared | PreviewsMade | Progress | Closed | Failure

_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def decode_request(line: bytes) -> Request:
    """Raises `msgspec.MsgspecError` on anything that is not a request."""
    return _requests.decode(line)


def decode_reply(line: bytes) -> Reply:
    """Raises `msgspec.MsgspecError` on anything that is not a reply."""
    return _replies.decode(line)
