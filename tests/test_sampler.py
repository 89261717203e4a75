"""The sampler: ComfyUI's res_multistep on ComfyUI's schedule, through diffusers' scheduler interface."""

from __future__ import annotations

import inspect
import math

import msgspec
import pytest
import torch

from pytest_zimage.catalog import load_catalog
from pytest_zimage.engines.sampler import (
    ResMultistepScheduler,
    build_scheduler,
    res_multistep_coefficients,
    unshifted_sigmas,
)
from pytest_zimage.engines.schedule import is_evenly_spaced
from pytest_zimage.errors import UnsupportedError

SCHEDULE = [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]

# x' = a x + w1 D + w2 D_old of the eight steps, as ComfyUI's sampler computes them.
TABLE = [
    (0.954545, 0.045455, 0),
    (0.942857, 0.093636, -0.036493),
    (0.925926, 0.123138, -0.049064),
    (0.9, 0.169652, -0.069652),
    (0.857143, 0.250047, -0.107190),
    (0.777778, 0.410948, -0.188726),
    (0.6, 0.840984, -0.440984),
    (0, 1, 0),
]


@pytest.fixture
def workload():
    return load_catalog().workload("turbo-1024")


def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Any smooth field will do, as long as it depends on both."""
    return torch.sin(3 * x) + sigma * x


def draw(scheduler, workload, start: torch.Tensor) -> torch.Tensor:
    scheduler.set_timesteps(sigmas=unshifted_sigmas(workload), device="cpu", mu=0.7)
    scheduler.set_begin_index(0)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, float(t) / 1000), t, x, return_dict=False)[0]
    return x


def reference(start: torch.Tensor) -> torch.Tensor:
    """The solver as published, in float64 and in terms of lambda = -log sigma."""
    sigmas = [3 * s / (1 + 2 * s) for s in (1 - i / 8 for i in range(8))] + [0.0]
    x, old = start.double(), None
    for i in range(8):
        sigma, following = sigmas[i], sigmas[i + 1]
        denoised = x - sigma * velocity(x, sigma)
        if old is None or following == 0:
            x = x + (following - sigma) * (x - denoised) / sigma
        else:
            lam, lam_next, lam_old = -math.log(sigma), -math.log(following), -math.log(sigmas[i - 1])
            h = lam_next - lam
            c2 = (lam_old - lam) / h
            phi1 = math.expm1(-h) / -h
            phi2 = (phi1 - 1) / -h
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c2) * denoised + phi2 / c2 * old)
        old = denoised
    return x


def test_schedule_is_comfyuis_simple_with_shift_three(workload) -> None:
    scheduler = build_scheduler(workload)
    scheduler.set_timesteps(sigmas=unshifted_sigmas(workload))
    assert scheduler.sigmas.tolist() == pytest.approx(SCHEDULE, abs=5e-7)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in SCHEDULE[:-1]], abs=5e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20])
def test_steps_that_divide_a_thousand_are_evenly_spaced_to_the_bit(workload, steps) -> None:
    """What is recorded was drawn with eight: not a bit of it may change."""
    assert unshifted_sigmas(msgspec.structs.replace(workload, steps=steps)) == [1 - i / steps for i in range(steps)]
    assert is_evenly_spaced(steps)


@pytest.mark.parametrize(
    ("steps", "levels"),
    [
        # int(i * 111.11...): 0, 111, 222, 333, 444, 555, 666, 777, 888 entries below the top of 1000.
        (9, [1.0, 0.889, 0.778, 0.667, 0.556, 0.445, 0.334, 0.223, 0.112]),
        # int(i * 35.714...): 0, 35, 71, 107, 142, 178, 214, 250, 285, 321, ...
        (28, [1.0, 0.965, 0.929, 0.893, 0.858, 0.822, 0.786, 0.75, 0.715, 0.679]),
    ],
)
def test_other_steps_come_from_comfyuis_table_of_a_thousand(workload, steps, levels) -> None:
    workload = msgspec.structs.replace(workload, steps=steps, sampler="euler")
    found = unshifted_sigmas(workload)
    assert len(found) == steps
    assert found[: len(levels)] == pytest.approx(levels, abs=1e-12)
    assert not is_evenly_spaced(steps)
    scheduler = build_scheduler(workload)
    scheduler.set_timesteps(sigmas=found)
    shifted = [3 * level / (1 + 2 * level) for level in levels]
    assert scheduler.sigmas.tolist()[: len(levels)] == pytest.approx(shifted, abs=1e-6)


def test_coefficients_are_those_of_the_table() -> None:
    exact = [3 * s / (1 + 2 * s) for s in (1 - i / 8 for i in range(8))] + [0.0]
    for step, expected in zip(res_multistep_coefficients(exact), TABLE, strict=True):
        assert tuple(step) == pytest.approx(expected, abs=6e-7)


def test_weights_of_a_step_leave_a_finished_image_alone() -> None:
    for a, w1, w2 in res_multistep_coefficients(SCHEDULE):
        assert a + w1 + w2 == pytest.approx(1)


def test_draws_what_the_published_solver_draws(workload) -> None:
    start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = draw(build_scheduler(workload), workload, start)
    expected = reference(start).float()
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)
    # The comparison above would also notice the other sampler.
    euler = draw(build_scheduler(msgspec.structs.replace(workload, sampler="euler")), workload, start)
    assert (euler - expected).norm() / expected.norm() > 1e-3


def test_a_second_image_does_not_remember_the_first(workload) -> None:
    scheduler = build_scheduler(workload)
    start = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(draw(scheduler, workload, start), draw(scheduler, workload, start))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_schedules_end_on_the_denoised_estimate(workload, steps: int) -> None:
    few = msgspec.structs.replace(workload, steps=steps)
    scheduler = build_scheduler(few)
    drawn = draw(scheduler, few, torch.zeros(1, 16, 4, 4))
    assert len(scheduler.timesteps) == steps
    assert torch.isfinite(drawn).all()


def test_pipeline_can_pass_sigmas() -> None:
    assert "sigmas" in inspect.signature(ResMultistepScheduler.set_timesteps).parameters


def test_unknown_sampler_is_refused_by_name(workload) -> None:
    with pytest.raises(UnsupportedError, match="heun"):
        build_scheduler(msgspec.structs.replace(workload, sampler="heun"))
