"""Draws with a diffusers pipeline inside the worker process, as ComfyUI would, and times it.

One image is: prompt to embeddings, noise, the sampler's steps, VAE decoding, and pixels in host memory. The
pipeline runs under `torch.inference_mode()`, since comfy-kitchen chooses its kernels by it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from msgspec import structs
from PIL import Image

from pytest_zimage.catalog.model import Workload
from pytest_zimage.checkpoints.acceleration import compiling, empty_compile_cache
from pytest_zimage.checkpoints.flops import transformer_flops
from pytest_zimage.checkpoints.loader import load_pipeline
from pytest_zimage.engines import faults
from pytest_zimage.engines.clock import DeviceClock, hold
from pytest_zimage.engines.dispatch_faults import break_dispatch
from pytest_zimage.engines.protocol import Draw, DrawImages, Drawn, DrawnImage, DrawnImages, Load, Loaded, Round, Traced
from pytest_zimage.engines.sampler import build_scheduler, unshifted_sigmas
from pytest_zimage.errors import EngineError, MeasurementError, UnsupportedError
from pytest_zimage.probes.dispatch import DispatchTrace
from pytest_zimage.probes.kitchen_log import Fallbacks

Report = Callable[[str, int, int], None]
"""What is being done, how many are done, of how many."""


class DiffusersEngine:
    """One variant in this process: `load` once, then `draw` as often as wanted."""

    def __init__(self) -> None:
        self._loaded: _Variant | None = None
        self._ballast: list[torch.Tensor] = []
        self._compiled: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pipeline(self) -> Any:
        """The loaded `ZImagePipeline`. Raises `EngineError` before `load`."""
        return self._ready().pipeline

    def load(self, request: Load) -> Loaded:
        """Read the variant's files and make it ready to draw.

        Raises `UnsupportedError` for a device that is not there, and whatever `load_pipeline` raises.
        """
        device = _device(request.device)
        self._ballast = _ballast(request.inject.memory_bytes, device)
        self._compiled = empty_compile_cache() if request.variant.compile else None
        files = {role: Path(path) for role, path in request.files.items()}
        loaded = load_pipeline(
            request.variant, request.dims, files, Path(request.tokenizer), build_scheduler(request.workload), device
        )
        phases_s = loaded.phases_s
        if request.inject.cold_load:
            hold(sum(phases_s.values()) * request.inject.cold_load)
            phases_s = {phase: seconds * (1 + request.inject.cold_load) for phase, seconds in phases_s.items()}
        break_dispatch(request.inject.dispatch, loaded.pipeline.transformer)
        self._loaded = _Variant(request, loaded.pipeline, device)
        return Loaded(
            phases_s=phases_s,
            load_s=sum(phases_s.values()),
            weight_bytes=loaded.weight_bytes,
            tensors=loaded.tensors,
            compute=loaded.compute,
            notes=loaded.notes,
            flops_per_image=self._loaded.flops_per_image(),
        )

    def draw(self, request: Draw, progress: Report) -> Drawn:
        """Draw `request.rounds` images; `progress` is called between them only.

        Raises `MeasurementError` for an image that is not what was asked for: NaN or infinite values, another number of
        transformer forwards than the workload's, or a quantised layer that comfy-kitchen computed in another way.
        """
        loaded = self._ready()
        if request.rounds < 1:
            raise MeasurementError(f"{request.rounds} rounds are no measurement", mend="ask for at least one")
        clock = loaded.first_clock if request.first else loaded.clock
        rounds = []
        for done in range(request.rounds):
            progress("image", done, request.rounds)
            image, pixels = loaded.draw(clock, loaded.workload)
            rounds.append(image)
        if request.save:
            _save(pixels, request.save)
        progress("image", request.rounds, request.rounds)
        return Drawn(tuple(rounds))

    def _ready(self) -> _Variant:
        if self._loaded is None:
            raise EngineError("nothing is loaded, so nothing can be drawn", mend="send Load before Draw")
        return self._loaded

    def trace(self) -> Traced:
        """Draw one untimed image of the workload and count what served it.

        Raises as `draw` does; a layer that comfy-kitchen computed in another way is then named.
        """
        return self._ready().trace()

    def draw_images(self, request: DrawImages, progress: Report) -> DrawnImages:
        """Draw and keep the images of `request`, untimed; raises as `draw` does."""
        loaded = self._ready()
        jobs = faults.misdirected(request.jobs, loaded.inject.quality)
        images = []
        for done, (job, drawn) in enumerate(zip(request.jobs, jobs, strict=True)):
            progress("image for quality", done, len(jobs))
            workload = structs.replace(
                loaded.workload, prompt=drawn.text, seed=drawn.seed, width=request.width, height=request.height
            )
            _, pixels = loaded.draw(loaded.plain_clock, workload)
            pixels = faults.damaged(pixels, loaded.inject.quality, job.seed)
            _save(pixels, job.path)
            images.append(DrawnImage(job.prompt, job.seed, job.path, _digest(pixels)))
        return DrawnImages(tuple(images))


class _Variant:
    """A loaded pipeline and the workload it draws."""

    def __init__(self, request: Load, pipeline: Any, device: torch.device) -> None:
        self.clock = DeviceClock(device, request.inject.warm_latency)
        self.first_clock = DeviceClock(device, request.inject.cold_load)
        self.plain_clock = DeviceClock(device)
        self.inject = request.inject
        self._name = request.variant.name
        self._compiles = request.variant.compile
        self.workload = request.workload
        self._sigmas = unshifted_sigmas(request.workload)
        self.pipeline = pipeline
        self._device = device
        self._fallbacks = Fallbacks()
        self._forwards = 0
        pipeline.transformer.register_forward_pre_hook(self._count)

    def draw(self, clock: DeviceClock, workload: Workload) -> tuple[Round, torch.Tensor]:
        """One timed image, and its pixels `[H, W, 3]` uint8 on the host."""
        with self._fallbacks.listening():
            drawn = self._draw(clock, workload)
        if self._fallbacks.calls:
            self.trace()  # names the layers
            raise self._fallbacks.error(self._name)
        return drawn

    def trace(self) -> Traced:
        """Draw one untimed image, and count what served it."""
        with DispatchTrace(self.pipeline.transformer) as trace:
            self._draw(self.plain_clock, self.workload)
        trace.refuse_fallbacks(self._name)
        return trace.traced()

    def flops_per_image(self) -> int:
        """Operations of the transformer in one image of the variant's own workload."""
        prompts = (self.workload.prompt, self.workload.negative_prompt)[: self.workload.forwards_per_step]
        # Sequences of one batch are padded to the longest.
        tokens = max(self._tokens(prompt).shape[1] for prompt in prompts)
        return transformer_flops(self.pipeline.transformer.config, self.workload, tokens)

    def _draw(self, clock: DeviceClock, workload: Workload) -> tuple[Round, torch.Tensor]:
        self._forwards = 0

        def step_end(_pipeline: object, step: int, _timestep: object, _tensors: object) -> dict[str, torch.Tensor]:
            clock.mark(f"step_{step + 1}")
            return {}

        with torch.inference_mode(), compiling(self._name) if self._compiles else nullcontext():
            clock.start()
            prompt = self._encode(workload.prompt)
            negative = [self._encode(workload.negative_prompt)] if workload.guidance > 0 else None
            clock.mark("text_encode")
            latents = self.pipeline(
                prompt_embeds=[prompt],
                negative_prompt_embeds=negative,
                latents=self._noise(workload),
                height=workload.height,
                width=workload.width,
                num_inference_steps=workload.steps,
                sigmas=self._sigmas,
                guidance_scale=workload.guidance,
                callback_on_step_end=step_end,
                callback_on_step_end_tensor_inputs=[],
                output_type="latent",
                return_dict=False,
            )[0]
            decoded = self._decode(latents)
            clock.mark("vae_decode")
            pixels = _to_pixels(decoded)
            clock.mark("to_image")
            seconds, phases_s = clock.stop()
            self._check(decoded)
        return Round(seconds, phases_s, self._forwards, _digest(pixels)), pixels

    def _encode(self, prompt: str) -> torch.Tensor:
        """`[tokens, hidden]` in the transformer's type: the last layer but one, unpadded, without the final norm."""
        ids = self._tokens(prompt).to(self._device)
        states = self.pipeline.text_encoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        embeddings: torch.Tensor = states[-2][0].to(self.pipeline.transformer.dtype)
        return embeddings

    def _tokens(self, prompt: str) -> torch.Tensor:
        """`[1, tokens]` of the prompt in Qwen's chat template."""
        tokenizer = self.pipeline.tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
        return ids

    def _noise(self, workload: Workload) -> torch.Tensor:
        """`[1, 16, H/8, W/8]` float32, drawn on the host so that every device starts from the same."""
        scale = self.pipeline.vae_scale_factor
        shape = (1, self.pipeline.transformer.in_channels, workload.height // scale, workload.width // scale)
        generator = torch.Generator("cpu").manual_seed(workload.seed)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self._device)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to an image `[1, 3, H, W]` in [-1, 1], as the pipeline itself would."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        decoded: torch.Tensor = vae.decode(latents, return_dict=False)[0]
        return decoded

    def _count(self, _transformer: object, arguments: tuple[Any, ...]) -> None:
        # Each image of a batch is a forward of its own: with guidance the pipeline computes two in one call.
        self._forwards += len(arguments[0])

    def _check(self, decoded: torch.Tensor) -> None:
        steps, each = self.workload.steps, self.workload.forwards_per_step
        if self._forwards != steps * each:
            raise MeasurementError(
                f"{self._name}: {self._forwards} transformer forwards for {steps} steps" + f" of {each}" * (each > 1),
                mend="check the installed diffusers: the schedule it runs is not the workload's",
            )
        if not bool(torch.isfinite(decoded).all()):
            raise MeasurementError(
                f"{self._name}: the image holds NaN or infinite values",
                mend="check the weights: `--zimage-list` shows where each file was found",
            )


def _digest(pixels: torch.Tensor) -> str:
    """sha256 of the pixels, row by row: the fingerprint of an image."""
    return hashlib.sha256(pixels.numpy().data).hexdigest()


def _save(pixels: torch.Tensor, path: str) -> None:
    # The lightest compression: a tenth larger than the default's files, in a seventh of its time.
    Image.fromarray(pixels.numpy()).save(path, format="PNG", compress_level=1)


def _to_pixels(decoded: torch.Tensor) -> torch.Tensor:
    """`[1, 3, H, W]` in [-1, 1] to `[H, W, 3]` uint8 on the host, rounded as diffusers' image processor does."""
    image = (decoded[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float()
    return (image * 255).round().to(torch.uint8).contiguous().cpu()


def _device(name: str) -> torch.device:
    """The device, its context made, so that a cold load does not pay for what a running server has."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise UnsupportedError(f"torch sees no device {name!r}", mend="check the driver and how torch was built")
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        raise UnsupportedError(f"the diffusers engine does not run on {name!r}", mend="use cpu or a CUDA device")
    return device


def _ballast(size: int, device: torch.device) -> list[torch.Tensor]:
    """`size` bytes of host memory, and of device memory where it is another, written so that they are really held."""
    if not size:
        return []
    places = {torch.device("cpu"), device}
    return [torch.ones(size, dtype=torch.uint8, device=place) for place in places]
