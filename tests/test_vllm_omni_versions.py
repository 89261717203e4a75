"""What is known of vLLM-Omni's versions: what is handled, and what is refused with a sentence."""

from __future__ import annotations

import pytest
from msgspec import structs

from pytest_zimage.catalog import load_catalog
from pytest_zimage.engines.vllm_omni.versions import check, parse, steps_sent, useful_steps
from pytest_zimage.errors import UnsupportedError

CATALOG = load_catalog()
TURBO = CATALOG.workload("turbo-1024x512")
BASE = structs.replace(CATALOG.workload("base-1024"))


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("0.30.0", (0, 30)),
        ("v0.14.0rc1", (0, 14)),
        ("0.26.1.dev3+gabc1234", (0, 26)),
        ("1.0", (1, 0)),
        (" 0.16.0\n", (0, 16)),
    ],
)
def test_a_version_is_its_first_two_numbers(text, release):
    version = parse(text)
    assert version.release == release
    assert version.text == text.strip()


@pytest.mark.parametrize("text", ["", "dev", "0.12.0rc1", "0.1.dev1+g1234", "0.99999999", "latest 0.30", "9" * 500])
def test_what_is_not_known_is_refused(text):
    with pytest.raises(UnsupportedError, match="the server says its version is") as caught:
        parse(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "draws"),
    [
        ("0.14.0", True),
        ("0.16.0", True),
        ("0.18.0", False),
        ("0.20.0", False),
        ("0.22.1", False),
        ("0.24.0", False),
        ("0.25.1.dev7", False),
        ("0.26.0", True),
        ("0.30.0", True),
        ("0.31.0", True),
        ("1.2.0", True),
    ],
)
def test_no_guidance_is_refused_where_it_would_be_guidance(text, draws):
    if draws:
        check(parse(text), TURBO, same_schedule=False)
        return
    with pytest.raises(UnsupportedError, match=r"So do 0\.18 to 0\.24") as caught:
        check(parse(text), TURBO, same_schedule=False)
    assert "5056" in caught.value.mend


@pytest.mark.parametrize(
    ("text", "guidance", "draws"), [("0.16.0", 1.0, False), ("0.16.0", 4.0, True), ("0.20.0", 1.0, True)]
)
def test_guidance_is_refused_where_it_would_be_none(text, guidance, draws):
    workload = structs.replace(BASE, guidance=guidance)
    if draws:
        check(parse(text), workload, same_schedule=False)
        return
    with pytest.raises(UnsupportedError, match="draws without guidance up to a scale of 1"):
        check(parse(text), workload, same_schedule=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [("0.14.0", "its noise on the GPU"), ("0.31.0", "has not been looked at"), ("0.16.0", ""), ("0.30.0", "")],
)
def test_the_same_schedule_is_drawn_only_where_it_is_known_to_be(text, says):
    if not says:
        check(parse(text), TURBO, same_schedule=True)
        return
    with pytest.raises(UnsupportedError, match=says):
        check(parse(text), TURBO, same_schedule=True)


@pytest.mark.parametrize(("steps", "same"), [(4, True), (8, True), (9, False), (20, True), (28, False)])
def test_the_same_schedule_is_refused_where_the_formulas_disagree(steps, same):
    workload = structs.replace(TURBO, steps=steps)
    check(parse("0.30.0"), workload, same_schedule=False)
    if same:
        check(parse("0.30.0"), workload, same_schedule=True)
        return
    with pytest.raises(UnsupportedError, match=f"in {steps} steps, are not: they come from a table of 1000") as caught:
        check(parse("0.30.0"), workload, same_schedule=True)
    assert "divides 1000" in caught.value.mend


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"sampler": "res_multistep"}, "the euler sampler only"), ({"shift": 6.0}, "own shift of 3")],
)
def test_another_sampler_or_shift_is_refused_by_every_version(changed, says):
    with pytest.raises(UnsupportedError, match=says) as caught:
        check(parse("0.30.0"), structs.replace(TURBO, **changed), same_schedule=False)
    assert "turbo-1024x512" in caught.value.mend


def test_steps_are_sent_as_published_and_one_more_for_the_noise_levels_of_others():
    assert steps_sent(TURBO, same_schedule=False) == 8
    assert steps_sent(TURBO, same_schedule=True) == 9
    assert useful_steps(parse("0.30.0"), 8) == "7 of 8"
    assert useful_steps(parse("0.30.0"), 9) == "8 of 9"
    assert useful_steps(parse("0.32.0"), 8) == "unknown of 8"
