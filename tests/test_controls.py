"""CLIPScore judges a prompt only where the prompt's own images beat black, noise and another prompt's image."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from pytest_zimage.errors import MeasurementError
from pytest_zimage.quality.controls import judge_controls
from pytest_zimage.quality.limits import load_limits
from pytest_zimage.quality.protocol import ControlScores

GAP = load_limits().controls.gap
GOOD = ControlScores(
    prompt="anime", real=(0.31, 0.33), black=(0.20,), noise=(0.18,), other=(0.22, 0.24), other_prompt="text_render"
)


def outcome(gap: float = GAP, **changes):
    (judged,) = judge_controls([replace(GOOD, **changes)], gap)
    return judged


def test_a_clear_lead_is_fit():
    judged = outcome()
    assert judged.fit
    assert judged.controls == {"black": 0.20, "noise": 0.18, "image of text_render": pytest.approx(0.23)}
    assert (judged.strongest, judged.lead) == ("image of text_render", pytest.approx(0.09))
    assert judged.reason == (
        "its own images (0.3200) exceed the strongest control, image of text_render (0.2300), by more than 0.02: "
        "the lead is +0.0900"
    )


@pytest.mark.parametrize(
    ("changes", "strongest"),
    [
        ({"black": (0.35,)}, "black"),
        ({"noise": (0.35,)}, "noise"),
        ({"other": (0.35, 0.35)}, "image of text_render"),
        ({"real": (0.1, 0.1)}, "image of text_render"),
    ],
)
def test_any_control_that_wins_makes_it_unfit(changes, strongest):
    judged = outcome(**changes)
    assert not judged.fit
    assert judged.strongest == strongest
    assert judged.lead < 0
    assert "do not exceed" in judged.reason


@pytest.mark.parametrize(("lead", "fit"), [(0.25, False), (0.2501, True), (0.2499, False)])
def test_the_gap_itself_is_not_enough(lead, fit):
    judged = outcome(0.25, real=(lead,), black=(0.0,), noise=(-0.5,), other=(-0.5,))
    assert judged.fit is fit
    assert judged.gap == 0.25


def test_black_of_two_sizes_counts_by_its_mean():
    assert outcome(black=(0.1, 0.3)).controls["black"] == pytest.approx(0.2)


def test_a_set_of_one_prompt_says_what_is_missing():
    judged = outcome(other=(), other_prompt="")
    assert judged.fit
    assert set(judged.controls) == {"black", "noise"}
    assert judged.reason.endswith("a set of one prompt has no other prompt's image to lose")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"real": ()}, "the prompt's own images"),
        ({"black": ()}, "black"),
        ({"noise": (float("nan"),)}, "noise"),
        ({"other": ()}, "image of text_render"),
        ({"real": (0.3, float("inf"))}, "the prompt's own images"),
    ],
)
def test_missing_or_senseless_scores_are_errors(changes, what):
    with pytest.raises(MeasurementError, match=f"controls of anime: {what}: .* are no scores"):
        outcome(**changes)
