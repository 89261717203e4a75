"""What the test process and a worker say to each other: one JSON object a line, typed on both sides.

The worker answers each request with exactly one reply, preceded by any number of `Progress` lines. Times are seconds,
sizes bytes. Nothing here imports torch, so that both sides can.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from pytest_zimage.catalog.model import ModelDims, Role, Variant, Workload


class Injection(Struct, frozen=True):
    """Faults put in on purpose, to prove that a gate can fail. Zero means none."""

    warm_latency: float = 0.0
    """Fraction of each phase's own time that every draw is slowed by."""
    cold_load: float = 0.0
    """Fraction of the cold load's own time that it is slowed by."""
    memory_bytes: int = 0
    """Extra memory, touched and held from before the load on."""
    quality: str = ""
    """`noise:SD` (of 1), `black`, `swap-prompts` or `wrong-seed`: what is done to the images drawn for quality."""
    fitness: str = ""
    """`throttle`, `process` or `canary:SHARE`: what is read of the machine although it is not so."""
    dispatch: str = ""
    """`fallback` (every operation on the slowest backend) or `dequantise` (quantised products fail)."""

    def __bool__(self) -> bool:
        return self != Injection()


# ---- requests ------------------------------------------------------------


class Load(Struct, frozen=True, tag=True):
    """Read one variant's files and make it ready to draw."""

    variant: Variant
    workload: Workload
    dims: ModelDims
    files: dict[Role, str]
    tokenizer: str
    device: str
    """A torch device: `cpu` or `cuda:0`."""
    inject: Injection = Injection()
    replays_forwards: bool = False
    """As `DeviceClass.replays_forwards`."""


class Draw(Struct, frozen=True, tag=True):
    """Draw `rounds` images one after another, each timed with the device synchronised around it."""

    rounds: int
    first: bool = False
    """The image that completes the cold load; it is injected by `cold_load`, never by `warm_latency`."""
    save: str = ""
    """Where to write the last image as PNG, outside the timed region."""


class ImageJob(Struct, frozen=True):
    """One image to draw and keep, outside any timing."""

    prompt: str
    """The prompt's name in its set."""
    text: str
    seed: int
    path: str
    """Where the PNG goes; its folder exists."""


class DrawImages(Struct, frozen=True, tag=True):
    """Draw images for the quality judge; nothing of it is timed or counted into memory peaks reported before."""

    jobs: tuple[ImageJob, ...]
    width: int
    height: int


class Canary(Struct, frozen=True, tag=True):
    """Time a matrix product and a copy of fixed sizes: how fast the device is at the moment, whatever the model."""


class Trace(Struct, frozen=True, tag=True):
    """Draw one untimed image and count which backend served each operation."""


class Report(Struct, frozen=True, tag=True):
    """Ask for memory peaks and what the weights are held as."""


class Close(Struct, frozen=True, tag=True):
    """Leave in good order."""


Request = Load | Draw | DrawImages | Canary | Trace | Report | Close

# ---- replies ------------------------------------------------------------


class Hello(Struct, frozen=True, tag=True):
    """The first line of a worker: it has imported what it needs and holds no weights yet."""

    pid: int
    import_s: float
    rss_idle_bytes: int
    environment: dict[str, str]
    """Versions and device as the worker sees them."""


class DrawnImage(Struct, frozen=True):
    """One image on disk."""

    prompt: str
    seed: int
    path: str
    pixels_sha256: str
    """Of the uint8 RGB pixels, row by row; the fingerprint."""


class Progress(Struct, frozen=True, tag=True):
    """A sign of life during a request."""

    stage: str
    done: int = 0
    total: int = 0
    image: DrawnImage | None = None
    """One that is on disk now, of those that the request asked for."""


class Loaded(Struct, frozen=True, tag=True):
    """The variant is ready; nothing was missing, nothing unexpected, nothing left on meta."""

    phases_s: dict[str, float]
    """`read`, `build`, `to_device`: adds up to the load without the first image."""
    load_s: float
    weight_bytes: dict[str, int]
    """Bytes held by the three networks, by storage type (`bfloat16`, `float8_e4m3fn`, `nvfp4`, ...); empty, as the next
    two: this engine does not say."""
    tensors: dict[str, int]
    """Number of weight tensors by storage type, all three networks."""
    compute: dict[str, int]
    """Number of linears by how they compute (`plain`, `cast`, `weight-only`, `quantised-activations`)."""
    notes: tuple[str, ...] = ()
    flops_per_image: int | None = None
    """Floating-point operations of the transformer in one image of the workload: products and attention, no more. None:
    not known."""
    device_peak_bytes: int | None = None
    """The most that tensors held on the device while loading. None: it has no memory of its own, or does not say."""


class Round(Struct, frozen=True):
    """One timed image."""

    seconds: float
    phases_s: dict[str, float]
    """`text_encode`, `step_1`..`step_N`, `vae_decode`, `to_image`."""
    forwards: int | None
    """Transformer forwards counted during this image; None: this engine does not count them."""
    pixels_sha256: str
    seed: int | None = None
    """What it was drawn from, where rounds differ in it; None: the workload's."""
    beside_s: dict[str, float] = {}
    """Other clocks of the same image, shown and never judged: `client`, `queue`, `png`."""


class Drawn(Struct, frozen=True, tag=True):
    """The images of one `Draw`."""

    rounds: tuple[Round, ...]


class DrawnImages(Struct, frozen=True, tag=True):
    """The images of one `DrawImages`, in the order of its jobs."""

    images: tuple[DrawnImage, ...]


class CanaryTimed(Struct, frozen=True, tag=True):
    """How fast the device was. None: not timed on this device."""

    matmul_tflops: float | None = None
    """bfloat16 matrix product, 1e12 operations a second: the ceiling of everything the model multiplies."""
    copy_gb_s: float | None = None
    """Copy within the device's memory, 1e9 bytes a second, read and written both counted."""
    notes: tuple[str, ...] = ()
    """Why a device that has a canary was not timed."""


class Traced(Struct, frozen=True, tag=True):
    """What one image called."""

    dispatch: dict[str, int]
    """Calls by `operation: backend`, and by `linear: precision` for the linears."""
    dequantised: dict[str, int] = {}
    """Calls by layer, for layers that compute quantised and dequantised instead."""
    text_encoding: str = ""
    """How prompts are encoded from here on, as `Replays.how`."""
    transformer_forwards: str = ""
    """The same for the transformer's forwards."""


class Reported(Struct, frozen=True, tag=True):
    """Peaks since the worker started. None: this machine cannot say; `unavailable`, or else `notes`, says why."""

    rss_peak_bytes: int | None
    rss_peak_source: str
    rss_sampled_peak_bytes: int | None
    device_peak_bytes: int | None
    device_reserved_peak_bytes: int | None
    nvml_process_peak_bytes: int | None
    notes: tuple[str, ...] = ()
    device_held_bytes: int | None = None
    """What tensors ask of the device between images, after all were drawn: weights, and whatever stays beside them."""
    unavailable: dict[str, str] = {}
    """By metric, why it cannot be judged: its figure is None, or is not of this run alone."""


class Closed(Struct, frozen=True, tag=True):
    """The last line of a worker."""


class Failure(Struct, frozen=True, tag=True):
    """The request failed; the worker is still there and may be asked to close."""

    kind: str
    """Class name of the error; the names of `pytest_zimage.errors` come back as themselves."""
    message: str
    mend: str = ""
    traceback: str = ""


Reply = Hello | Progress | Loaded | Drawn | DrawnImages | CanaryTimed | Traced | Reported | Closed | Failure

_encoder = msgspec.json.Encoder()
_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def encode(message: Struct) -> bytes:
    """One line, newline included."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """Raises `msgspec.MsgspecError` on anything that is not a request."""
    return _requests.decode(line)


def decode_reply(line: bytes) -> Reply:
    """Raises `msgspec.MsgspecError` on anything that is not a reply."""
    return _replies.decode(line)
