"""The samplers of ComfyUI on diffusers' flow-matching schedule.

res_multistep as ComfyUI k_diffusion/sampling.py computes it (eta 0; the second-order multistep of "Refined Exponential
Solver", https://arxiv.org/abs/2308.02157), as coefficients of one step:

    x' = a x + w1 D + w2 D_old        with D = x - sigma v, the denoised estimate
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)

from pytest_zimage.catalog.model import Workload
from pytest_zimage.engines.schedule import simple_levels
from pytest_zimage.errors import UnsupportedError


class Coefficients(NamedTuple):
    """Weights of the sample, the denoised estimate and the previous one."""

    sample: float
    denoised: float
    previous: float


def res_multistep_coefficients(sigmas: Sequence[float]) -> list[Coefficients]:
    """One row per step of a descending schedule that ends in 0; the first and the last step are Euler steps."""
    steps = []
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        if i == 0 or sigma_next == 0:
            steps.append(Coefficients(sigma_next / sigma, 1 - sigma_next / sigma, 0.0))
            continue
        # lambda = -log sigma is the time in which the linear part of the flow decays exactly as e^-h.
        h = math.log(sigma / sigma_next)
        c2 = math.log(sigma / sigmas[i - 1]) / h
        phi1 = math.expm1(-h) / -h
        phi2 = (phi1 - 1) / -h
        b2 = phi2 / c2
        steps.append(Coefficients(math.exp(-h), h * (phi1 - b2), h * b2))
    return steps


class ResMultistepScheduler(FlowMatchEulerDiscreteScheduler):
    """diffusers' flow-matching scheduler with ComfyUI's res_multistep step; the schedule is the base class's."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        # The pipeline passes custom sigmas only to a scheduler that names them.
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        super().set_timesteps(num_inference_steps, "cpu", sigmas, mu, timesteps)
        # Sigmas stay on the host: as plain numbers they enter a step without a synchronisation.
        self._sigmas: list[float] = self.sigmas.tolist()
        self._steps = res_multistep_coefficients(self._sigmas)
        self._denoised: torch.Tensor | None = None
        self._taken = 0
        schedule: Any = self.timesteps
        self.timesteps = schedule.to(device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *_: Any,
        return_dict: bool = True,
        **__: Any,
    ) -> Any:
        """The next step of the schedule, in order; `sample` and the result are float32, whatever the model's output."""
        a, w1, w2 = self._steps[self._taken]
        sample = sample.to(torch.float32)
        denoised = sample - self._sigmas[self._taken] * model_output.to(torch.float32)
        result = sample * a + denoised * w1 if a else denoised
        if w2 and self._denoised is not None:
            result = result + self._denoised * w2
        self._denoised = denoised
        self._taken += 1
        output: Any = FlowMatchEulerDiscreteSchedulerOutput
        return output(prev_sample=result) if return_dict else (result,)


def build_scheduler(workload: Workload) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler a workload names. Raises `UnsupportedError` for a sampler this engine does not have."""
    kinds: dict[str, type[FlowMatchEulerDiscreteScheduler]] = {
        "res_multistep": ResMultistepScheduler,
        "euler": FlowMatchEulerDiscreteScheduler,
    }
    if workload.sampler not in kinds:
        raise UnsupportedError(
            f"workload {workload.name!r}: the diffusers engine has no sampler {workload.sampler!r}",
            mend=f"choose one of {', '.join(kinds)}",
        )
    kind: Any = kinds[workload.sampler]
    scheduler: FlowMatchEulerDiscreteScheduler = kind(
        num_train_timesteps=1000, shift=workload.shift, use_dynamic_shifting=False
    )
    return scheduler


def unshifted_sigmas(workload: Workload) -> list[float]:
    """The `simple` schedule before the shift, which the scheduler applies."""
    return simple_levels(workload.steps)
