"""One image of a loaded pipeline, as ComfyUI would draw it: timed in phases, checked, and counted.

An image is: prompt to embeddings, noise, the sampler's steps, VAE decoding, and pixels in host memory. The pipeline
runs under `torch.inference_mode()`, since comfy-kitchen chooses its kernels by it.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from typing import Any

import torch
from msgspec import structs

from pytest_zimage.catalog.model import Workload
from pytest_zimage.checkpoints.acceleration import compiling
from pytest_zimage.checkpoints.flops import transformer_flops
from pytest_zimage.engines.clock import DeviceClock
from pytest_zimage.engines.encoding import PromptEncoder
from pytest_zimage.engines.forwards import Forwards
from pytest_zimage.engines.protocol import Load, Round, Traced
from pytest_zimage.engines.sampler import unshifted_sigmas
from pytest_zimage.errors import MeasurementError
from pytest_zimage.probes.dispatch import DispatchTrace
from pytest_zimage.probes.kitchen_log import Fallbacks


class LoadedVariant:
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
        self.encoder = PromptEncoder(pipeline.text_encoder, device)
        self.forwards = Forwards(pipeline.transformer, replays=request.replays_forwards and device.type == "cuda")
        self._fallbacks = Fallbacks()

    def draw(self, clock: DeviceClock, workload: Workload) -> tuple[Round, torch.Tensor]:
        """One timed image, and its pixels `[H, W, 3]` uint8 on the host.

        Raises `MeasurementError` for an image that is not what was asked for: NaN or infinite values, another number
        of transformer forwards than the workload's, or a quantised layer that comfy-kitchen computed in another way.
        """
        with self._fallbacks.listening():
            drawn = self._draw(clock, workload)
        if self._fallbacks.calls:
            self.trace()  # names the layers
            raise self._fallbacks.error(self._name)
        return drawn

    def trace(self) -> Traced:
        """Draw one untimed image, and count what served it; raises as `draw` does.

        Afterwards the workload's prompt is warm: what is timed from here on replays what can be.
        """
        with DispatchTrace(self.pipeline.transformer) as trace:
            self._draw(self.plain_clock, self.workload, replay=False)
        trace.refuse_fallbacks(self._name)
        self._warm_up()
        return structs.replace(trace.traced(), text_encoding=self.encoder.how, transformer_forwards=self.forwards.how)

    def _warm_up(self) -> None:
        """Capture what drawing the workload takes; it has just been drawn."""
        # A kernel that refuses to be captured may be replaced by dequantising, and be replayed so for good.
        fallbacks = Fallbacks()
        with fallbacks.listening(), torch.inference_mode():
            for prompt in (self.workload.prompt, self.workload.negative_prompt)[: self.workload.forwards_per_step]:
                self.encoder.capture(self._tokens(prompt))
            self.forwards.capture()
        if fallbacks.calls:
            raise fallbacks.error(self._name)

    def flops_per_image(self) -> int:
        """Operations of the transformer in one image of the variant's own workload."""
        prompts = (self.workload.prompt, self.workload.negative_prompt)[: self.workload.forwards_per_step]
        # Sequences of one batch are padded to the longest.
        tokens = max(self._tokens(prompt).shape[1] for prompt in prompts)
        return transformer_flops(self.pipeline.transformer.config, self.workload, tokens)

    def _draw(self, clock: DeviceClock, workload: Workload, *, replay: bool = True) -> tuple[Round, torch.Tensor]:
        self.forwards.count, self.forwards.replay = 0, replay

        def step_end(_pipeline: object, step: int, _timestep: object, _tensors: object) -> dict[str, torch.Tensor]:
            clock.mark(f"step_{step + 1}")
            return {}

        with torch.inference_mode(), compiling(self._name) if self._compiles else nullcontext():
            clock.start()
            prompt = self._encode(workload.prompt, replay=replay)
            negative = [self._encode(workload.negative_prompt, replay=replay)] if workload.guidance > 0 else None
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
            pixels = to_pixels(decoded)
            clock.mark("to_image")
            seconds, phases_s = clock.stop()
            self._check(decoded)
        return Round(seconds, phases_s, self.forwards.count, digest(pixels)), pixels

    def _encode(self, prompt: str, *, replay: bool) -> torch.Tensor:
        """`[tokens, hidden]` in the transformer's type: the last layer but one, unpadded, without the final norm."""
        return self.encoder(self._tokens(prompt), replay=replay).to(self.pipeline.transformer.dtype)

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

    def _check(self, decoded: torch.Tensor) -> None:
        steps, each = self.workload.steps, self.workload.forwards_per_step
        if self.forwards.count != steps * each:
            raise MeasurementError(
                f"{self._name}: {self.forwards.count} transformer forwards for {steps} steps"
                + f" of {each}" * (each > 1),
                mend="check the installed diffusers: the schedule it runs is not the workload's",
            )
        if not bool(torch.isfinite(decoded).all()):
            raise MeasurementError(
                f"{self._name}: the image holds NaN or infinite values",
                mend="check the weights: `--zimage-list` shows where each file was found",
            )


def digest(pixels: torch.Tensor) -> str:
    """sha256 of the pixels, row by row: the fingerprint of an image."""
    return hashlib.sha256(pixels.numpy().data).hexdigest()


def to_pixels(decoded: torch.Tensor) -> torch.Tensor:
    """`[1, 3, H, W]` in [-1, 1] to `[H, W, 3]` uint8 on the host, rounded as diffusers' image processor does."""
    image = (decoded[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float()
    return (image * 255).round().to(torch.uint8).contiguous().cpu()
