"""The rule for paired image scores: its formulas, its boundaries, and what it promises over many simulated sessions."""

import math
import statistics

import numpy as np
import pytest
import scipy.stats
from loading import module_of

from pytest_zimage.catalog import load_catalog
from pytest_zimage.catalog.model import Metric
from pytest_zimage.errors import BaselineError, CatalogError, MeasurementError
from pytest_zimage.verdict.paired import PairRule, judge_paired, pair_name, prompt_of, seed_stages
from pytest_zimage.verdict.paired_published import judge_printed
from pytest_zimage.verdict.words import word

CATALOG = load_catalog()
CLIP, LPIPS, PSNR, DRIFT = (CATALOG.metrics[name] for name in ("clip_score", "lpips", "psnr", "lpips_recorded"))
SET = CATALOG.prompt_set("quality-6x3")
PAIRS = [pair_name(prompt.name, seed) for prompt, seed in SET.pairs()]
RULE = PairRule.of(CLIP)


def scores(base=0.33, change=0.0, sd=0.0, seed=1, pairs=PAIRS):
    """Scores that differ by `change` from `base` in the mean, exactly, with a deviation of `sd`, exactly."""
    noise = np.random.default_rng(seed).normal(size=len(pairs))
    if len(pairs) > 1:
        noise = (noise - noise.mean()) / noise.std(ddof=1)
    return {pair: base + change + sd * n for pair, n in zip(pairs, noise.tolist(), strict=True)}


BASE = scores()


def judge(change=0.0, sd=0.0, rule=RULE, **more):
    return judge_paired(scores(change=change, sd=sd), BASE, PAIRS, rule, **more)


# ---- formulas and boundaries ------------------------------------------------------------


def test_judgement_follows_the_printed_formulas():
    d = np.random.default_rng(4).normal(-0.004, 0.015, len(PAIRS))
    got = judge_paired({p: BASE[p] + x for p, x in zip(PAIRS, d, strict=True)}, BASE, PAIRS, RULE)
    error = d.std(ddof=1) / math.sqrt(18)
    half = scipy.stats.t.ppf(0.975, 17) * error
    assert got.scale == "absolute"
    assert got.change == pytest.approx(d.mean())
    assert got.interval == pytest.approx((d.mean() - half, d.mean() + half))
    assert (got.value, got.baseline) == (pytest.approx(0.33 + d.mean()), pytest.approx(0.33))
    assert (got.noise, got.band) == (pytest.approx(d.std(ddof=1)), 0.010)
    assert (got.k_base, got.k_new) == (18, 18)
    power = scipy.stats.nct.sf(scipy.stats.t.ppf(0.999, 17), 17, got.mde / error)
    assert power == pytest.approx(0.8, abs=0.001)


@pytest.mark.parametrize(
    ("change", "sd", "outcome"),
    [
        (0.0, 0.0, "pass"),
        (-0.0094, 0.0, "pass"),
        (-0.0096, 0.0, "inconclusive"),  # the floor of 0.001 leaves 0.0005 of doubt
        (-0.0101, 0.0, "regression"),
        (0.0099, 0.0, "pass"),
        (0.0101, 0.0, "improvement"),
        (0.0, 0.015, "pass"),
        (0.0, 0.03, "inconclusive"),
        (-0.012, 0.015, "inconclusive"),  # beyond the margin, not beyond chance
        (-0.014, 0.015, "regression"),
        (0.014, 0.015, "improvement"),
    ],
)
def test_outcomes(change, sd, outcome):
    assert judge(change, sd).outcome == outcome


def test_words():
    assert word(judge(-0.02).outcome, CLIP) == "WORSE"
    assert word(judge(0.02).outcome, CLIP) == "BETTER"


def test_lpips_is_the_same_rule_the_other_way_round():
    rule = PairRule.of(LPIPS)
    base = scores(0.17)
    worse = judge_paired(scores(0.17, 0.021), base, PAIRS, rule)
    assert (worse.outcome, worse.change) == ("regression", pytest.approx(0.021))
    assert worse.interval[0] < worse.change < worse.interval[1]
    assert judge_paired(scores(0.17, -0.021), base, PAIRS, rule).outcome == "improvement"
    assert judge_paired(scores(0.17, 0.019), base, PAIRS, rule).outcome == "pass"
    broken = {**base, "abstract/42": 0.28}
    assert judge_paired(broken, base, PAIRS, rule).outcome == "regression"
    assert judge_paired({**base, "abstract/42": 0.05}, base, PAIRS, rule).outcome == "pass"


@pytest.mark.parametrize(
    ("mean", "sd", "outcome"),
    [
        (0.0572, 0.0070, "pass"),  # bf16 on another make of CPU
        (0.0591, 0.0110, "pass"),  # nvfp4-mixed there, the furthest of all
        (0.0830, 0.0121, "regression"),  # bf16 drawn as fp8-cast
        (0.1317, 0.0094, "regression"),  # another sampler
    ],
)
def test_drift_is_more_than_another_cpu_and_less_than_another_variant(mean, sd, outcome):
    """Means and deviations as they were measured between previews of the tiny model's images."""
    nothing = dict.fromkeys(PAIRS, 0.0)
    assert judge_paired(scores(mean, sd=sd), nothing, PAIRS, PairRule.of(DRIFT)).outcome == outcome


def test_one_broken_image_is_named_whatever_the_mean():
    new = {**scores(sd=0.015), "chinese/7777": 0.22}
    got = judge_paired(new, BASE, PAIRS, RULE)
    assert got.outcome == "regression"
    assert got.notes == ("single images worse by more than 0.1: chinese/7777 0.33 -> 0.22",)
    assert not got.wants_more
    assert judge_paired({**BASE, "chinese/7777": 0.231}, BASE, PAIRS, RULE).outcome != "regression"


def test_a_broken_image_outweighs_a_better_mean():
    new = {**scores(change=0.05), "chinese/7777": 0.1}
    assert judge_paired(new, BASE, PAIRS, RULE).outcome == "regression"


def test_the_ceiling_holds_whatever_the_baseline_is():
    rule = PairRule.of(LPIPS, ceiling=0.27)
    drifted = scores(0.28)
    got = judge_paired(drifted, drifted, PAIRS, rule)
    assert (got.outcome, got.wants_more) == ("regression", False)
    assert "ceiling of 0.27" in got.notes[0]
    assert judge_paired(scores(0.26), scores(0.26), PAIRS, rule).outcome == "pass"


def test_a_margin_of_the_baseline_outranks_the_metrics():
    assert judge(-0.02, rule=PairRule.of(CLIP, margin=0.03)).outcome == "pass"


def test_equal_images_have_no_infinite_difference():
    rule = PairRule.of(PSNR)
    equal = dict.fromkeys(PAIRS, math.inf)
    same = judge_paired(equal, equal, PAIRS, rule)
    assert (same.outcome, same.value) == ("pass", 60.0)
    worse = judge_paired(dict.fromkeys(PAIRS, 40.0), equal, PAIRS, rule)
    assert (worse.outcome, worse.change) == ("regression", pytest.approx(-20))


# ---- few pairs, more seeds ------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_pairs_never_pass(count):
    pairs = PAIRS[:count]
    got = judge_paired(scores(pairs=pairs), BASE, pairs, RULE)
    assert (got.outcome, got.mde) == ("inconclusive", None)
    assert "takes 3" in got.notes[0]
    assert judge_paired(scores(change=-0.05, pairs=pairs), BASE, pairs, RULE).outcome == "inconclusive"
    assert judge_paired(scores(change=0.05, pairs=pairs), BASE, pairs, RULE).outcome == "inconclusive"
    assert judge_paired({**scores(pairs=pairs), pairs[0]: 0.2}, BASE, pairs, RULE).outcome == "regression"


def test_three_pairs_pass_only_when_they_hardly_differ():
    pairs = PAIRS[:3]
    assert judge_paired(scores(sd=0.003, pairs=pairs), BASE, pairs, RULE).outcome == "pass"
    assert judge_paired(scores(sd=0.015, pairs=pairs), BASE, pairs, RULE).outcome == "inconclusive"


def test_more_seeds_are_wanted_only_where_they_could_settle_it():
    assert judge(0.0, 0.03, further=True).wants_more
    assert not judge(0.0, 0.03, further=False).wants_more
    assert not judge(0.0, 0.01, further=True).wants_more
    assert not judge(-0.03, 0.01, further=True).wants_more


def test_stages_of_seeds():
    assert seed_stages(SET) == (0, 3, 6)
    assert [len(SET.pairs(more)) for more in seed_stages(SET)] == [18, 36, 54]
    assert seed_stages(CATALOG.prompt_set("vllm-3x1")) == (0,)


def test_names_of_pairs():
    assert pair_name("photo_woman", 42) == "photo_woman/42"
    assert prompt_of("photo_woman/42") == "photo_woman"


# ---- what may not be compared ------------------------------------------------------------


def test_a_missing_pair_is_an_error_and_not_a_smaller_n():
    lacking = {pair: score for pair, score in BASE.items() if pair not in ("anime/42", "abstract/12345")}
    with pytest.raises(MeasurementError, match="measurement has no score of anime/42, abstract/12345"):
        judge_paired(lacking, BASE, PAIRS, RULE)
    with pytest.raises(BaselineError, match="baseline has no score of anime/42, abstract/12345") as caught:
        judge_paired(BASE, lacking, PAIRS, RULE)
    assert "extend" in caught.value.mend


def test_many_missing_pairs_are_counted():
    with pytest.raises(MeasurementError, match="and 12 more"):
        judge_paired({}, BASE, PAIRS, RULE)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_an_error(bad):
    with pytest.raises(MeasurementError, match="no numbers: anime/42"):
        judge_paired({**BASE, "anime/42": bad}, BASE, PAIRS, RULE)
    with pytest.raises(BaselineError, match="no numbers: anime/42"):
        judge_paired(BASE, {**BASE, "anime/42": bad}, PAIRS, RULE)


def test_no_pairs_are_no_pass():
    with pytest.raises(MeasurementError, match="no pairs"):
        judge_paired({}, {}, [], RULE)


def test_a_prompt_whose_controls_do_not_lose_leaves_no_pass():
    got = judge(unfit={"chinese": "noise wins"})
    assert (got.outcome, got.k_new) == ("unfit", 15)
    assert got.notes == ("clip_score says nothing of chinese: noise wins",)
    assert judge(0.05, unfit={"chinese": "noise wins"}).outcome == "unfit"
    assert judge_paired(BASE, BASE, PAIRS, RULE, unfit={p.name: "?" for p in SET.prompts}).outcome == "unfit"


def test_a_regression_of_the_other_prompts_still_is_one():
    unfit = {"chinese": "noise wins"}
    got = judge(-0.03, unfit=unfit)
    assert (got.outcome, got.notes) == ("regression", ("clip_score says nothing of chinese: noise wins",))
    broken = {**BASE, "anime/42": 0.1}
    assert judge_paired(broken, BASE, PAIRS, RULE, unfit=unfit).outcome == "regression"
    assert judge_paired({**BASE, "chinese/42": 0.1}, BASE, PAIRS, RULE, unfit=unfit).outcome == "unfit"


# ---- published means ------------------------------------------------------------


class Printed:
    def __init__(self, mean, std, by_prompt=(), n=18):
        self.mean, self.std, self.n, self.by_prompt, self.bare = mean, std, n, dict(by_prompt), False


BY_PROMPT = Printed(0.33, 0.043, {prompt.name: 0.33 for prompt in SET.prompts})


def test_means_by_prompt_are_the_pairs_where_no_images_were_printed():
    got = judge_printed(scores(sd=0.004), BY_PROMPT, PAIRS, RULE)
    assert (got.outcome, got.k_base, got.k_new) == ("pass", 18, 18)
    assert "means of 6 prompts" in got.notes[-1]
    assert f"worse of {got.mde:.2g} 8 times out of 10" in got.notes[-1]
    assert judge_printed(scores(change=-0.03, sd=0.004), BY_PROMPT, PAIRS, RULE).outcome == "regression"


def test_a_mean_with_its_deviation_finds_little_and_says_so():
    printed = Printed(0.33, 0.043)
    new = scores(sd=0.043)
    got = judge_printed(new, printed, PAIRS, RULE)
    assert got.outcome == "inconclusive"
    error = math.sqrt(0.043**2 / 18 + statistics.stdev(new.values()) ** 2 / 18)
    half = scipy.stats.t.ppf(0.975, 34) * error
    assert got.interval == pytest.approx((-half, half))
    assert got.mde == pytest.approx(0.061, abs=0.001)
    assert "worse of 0.061 8 times out of 10, and nothing smaller" in got.notes[-1]
    assert judge_printed(scores(change=-0.03, sd=0.043), printed, PAIRS, RULE).outcome == "inconclusive"
    assert judge_printed(scores(change=-0.07, sd=0.043), printed, PAIRS, RULE).outcome == "regression"


def test_what_a_printed_mean_needs():
    with pytest.raises(BaselineError, match="no standard deviation"):
        judge_printed(BASE, Printed(0.33, 0.0), PAIRS, RULE)
    with pytest.raises(MeasurementError, match="anime/42"):
        judge_printed({k: v for k, v in BASE.items() if k != "anime/42"}, Printed(0.33, 0.04), PAIRS, RULE)
    lacking = {name: mean for name, mean in BY_PROMPT.by_prompt.items() if name != "anime"}
    with pytest.raises(BaselineError, match="no score of anime/mean"):
        judge_printed(BASE, Printed(0.33, 0.04, lacking), PAIRS, RULE)


def test_unfit_prompts_of_a_printed_table():
    got = judge_printed(BASE, BY_PROMPT, PAIRS, RULE, unfit={"chinese": "noise wins"})
    assert (got.outcome, got.k_new) == ("unfit", 15)
    assert judge_printed(BASE, Printed(0.33, 0.04), PAIRS, RULE, unfit={"chinese": "noise wins"}).outcome == "unfit"


# ---- the constants ------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("margin", 0),
        ("margin", math.nan),
        ("guard", 0.001),
        ("floor", -1),
        ("limits", (1.0, 0.0)),
        ("ceiling_room", 0.1),
    ],
)
def test_constants_that_judge_nothing_are_refused(tmp_path, key, value):
    row = {"title": '"x"', "unit": '"score"', "kind": '"paired"', "direction": '"higher"'}
    row |= {"margin": 0.01, "guard": 0.1, "floor": 0.001, key: list(value) if isinstance(value, tuple) else value}
    text = "\n".join(f"{name} = {told}" for name, told in row.items())
    path = tmp_path / "mine.toml"
    path.write_text(f"[metrics.mine]\n{text}\n")
    with pytest.raises(CatalogError, match=rf"\[metrics.mine\]: key '{key}'"):
        load_catalog([path])


def test_a_users_own_score_needs_nothing_else():
    row = Metric(name="mine", title="x", unit="score", kind="paired", margin=0.01, guard=0.1, floor=0.001)
    assert judge_paired(BASE, BASE, PAIRS, PairRule.of(row)).outcome == "pass"


# ---- promises ------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark_module():
    return module_of("benchmarks/paired_rule.py")


def test_promises_over_simulated_sessions(benchmark_module, capsys):
    assert benchmark_module.main(["--replicates", "60000"]) == 0
    told = capsys.readouterr().out
    assert "VIOLATED" not in told
    assert "found 100.0%; by the mean alone 0.0%" in told


@pytest.mark.parametrize(
    ("constants", "broken_promise"),
    [
        ({"margin": 0.0001, "guard": 0.03}, "false alarms"),
        ({"margin": 0.02}, "a drop of 0.02 found"),
        ({"guard": 0.3}, "one broken image"),
    ],
)
def test_a_weaker_rule_is_caught(benchmark_module, monkeypatch, capsys, constants, broken_promise):
    monkeypatch.setattr(benchmark_module, "CONSTANTS", {**benchmark_module.CONSTANTS, **constants})
    assert benchmark_module.main(["--replicates", "5000"]) == 1
    assert any(line.startswith("VIOLATED") and broken_promise in line for line in capsys.readouterr().out.splitlines())
