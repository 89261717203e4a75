"""The decision rule: its formulas, its order of answers, its promises by simulation."""

import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import scipy.stats
from loading import module_of

from pytest_zimage.baselines.schema import Published
from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import BaselineError, MeasurementError
from pytest_zimage.verdict import core
from pytest_zimage.verdict.constants import PooledNoise, RuleConstants
from pytest_zimage.verdict.exact import judge_exact
from pytest_zimage.verdict.noise import pooled_noise, runs_to_remeasure
from pytest_zimage.verdict.rule import judge, judge_control, run_score
from pytest_zimage.verdict.words import word

CATALOG = load_catalog()
WARM = CATALOG.metrics["warm_latency"]
RSS = CATALOG.metrics["rss_peak"]
RULE = RuleConstants.of(WARM)
BASE = [[second] * 10 for second in (0.995, 0.998, 1.0, 1.002, 1.005)]


def runs(*seconds):
    return [[second] * 10 for second in seconds]


@pytest.fixture(scope="module")
def benchmark_module():
    return module_of("benchmarks/decision_rule.py")


# ---- formulas ------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 3, 4, 5, 10, 15, 37])
def test_score_is_scipys_trimmed_mean_of_logs(rounds):
    times = np.random.default_rng(rounds).lognormal(size=rounds)
    assert run_score(times.tolist()) == pytest.approx(scipy.stats.trim_mean(np.log(times), 0.2), abs=1e-14)


def test_judgement_follows_the_printed_formulas():
    rng = np.random.default_rng(3)
    base, new = rng.normal(1, 0.01, (5, 10)).tolist(), rng.normal(1.01, 0.01, (2, 10)).tolist()
    m_base = [scipy.stats.trim_mean(np.log(r), 0.2) for r in base]
    m_new = [scipy.stats.trim_mean(np.log(r), 0.2) for r in new]
    d = np.mean(m_new) - np.mean(m_base)
    dof = 8 + 4 + 1
    s = math.sqrt((8 * 0.007**2 + np.var(m_base) * 5 + np.var(m_new) * 2) / dof)
    half = scipy.stats.t.ppf(0.975, dof) * s * math.sqrt(1 / 5 + 1 / 2)
    se_3 = s * math.sqrt(1 / 5 + 1 / 3)
    mde = max(math.log1p(0.03), scipy.stats.t.ppf(0.999, 14) * se_3) + scipy.stats.t.ppf(0.9, 14) * se_3
    got = judge(new, base, RULE)
    assert got.change == pytest.approx(math.expm1(d))
    assert got.interval == pytest.approx((math.expm1(d - half), math.expm1(d + half)))
    assert got.noise == pytest.approx(s)
    assert got.mde == pytest.approx(math.expm1(mde))
    assert (got.k_base, got.k_new) == (5, 2)


def test_published_summary_adds_the_uncertainty_of_the_printed_mean():
    got = judge(runs(5.5), Published(n=10, mean=5.5, std=0.07), RULE)
    se = math.sqrt(0.007**2 * 2 + (0.07 / 5.5) ** 2 / 10)
    assert got.interval[1] == pytest.approx(math.expm1(scipy.stats.t.ppf(0.975, 8) * se))
    assert got.k_base == 1


def test_published_summary_is_compared_with_the_mean_not_the_trimmed_mean():
    rounds = [1.0] * 9 + [2.0]
    assert judge([rounds], Published(n=10, mean=1.1, std=0.01), RULE).change == pytest.approx(0.0)


def test_noise_never_falls_below_the_floor():
    quiet = RuleConstants.of(WARM, pooled=PooledNoise(s0=1e-6, dof=20))
    assert judge(runs(1.0), runs(1, 1, 1, 1, 1), quiet).noise == WARM.floor


def test_wider_of_relative_and_absolute_band_counts():
    small, large = 500 * 2**20, 20 * 2**30
    constants = RuleConstants.of(RSS)
    assert judge([[small]], [[small]] * 5, constants).band == pytest.approx(64 / 500)
    assert judge([[large]], [[large]] * 5, constants).band == 0.02


def test_band_of_the_baseline_outranks_the_devices_which_outranks_the_metrics():
    assert RuleConstants.of(WARM, device=CATALOG.device("gb10")).band == 0.03
    assert RuleConstants.of(WARM, device=CATALOG.device("b200")).band == 0.02
    assert RuleConstants.of(WARM, device=CATALOG.device("h200"), band=0.05).band == 0.05


def test_pooled_noise_counts_from_eight_degrees_of_freedom_on():
    assert pooled_noise([runs(1.0, 1.01, 1.02, 1.03, 1.04)]) is None
    wide, narrow = runs(1.0, 1.02, 1.04, 1.06, 1.08), runs(1.0, 1.01, 1.02, 1.03, 1.04)
    scores = [[math.log(r[0]) for r in variant] for variant in (wide, narrow)]
    squares = sum(np.var(row) * 5 for row in scores)
    pooled = pooled_noise([wide, narrow])
    assert pooled.dof == 8
    assert pooled.s0 == pytest.approx(math.sqrt(squares / 8))
    assert RuleConstants.of(WARM, pooled=pooled).prior == pooled.s0
    assert RuleConstants.of(WARM, pooled=PooledNoise(s0=0.1, dof=7)).prior == WARM.prior


# ---- the order of answers ------------------------------------------------------------


@pytest.mark.parametrize(
    ("fresh", "outcome", "wants_more"),
    [
        ((1.0,), "pass", False),
        ((1.02,), "inconclusive", True),
        ((1.5,), "inconclusive", True),
        ((1.05, 1.05), "regression", False),
        ((1.05, 1.0), "inconclusive", True),
        ((1.05, 1.0, 1.0), "inconclusive", False),
        ((1.06, 1.025), "inconclusive", True),
        ((1.06, 1.025, 1.06), "regression", False),
        ((1.05, 0.95, 1.05), "inconclusive", False),
        ((1.03, 1.0, 1.0), "pass", False),
        ((1.025, 1.025), "inconclusive", True),
        ((1.025, 1.025, 1.025), "inconclusive", False),
        ((0.98,), "pass", False),
        ((0.9,), "pass", True),
        ((0.9, 1.0), "pass", False),
        ((0.9, 0.9), "improvement", False),
    ],
)
def test_sequence(fresh, outcome, wants_more):
    got = judge(runs(*fresh), BASE, RULE)
    assert (got.outcome, got.wants_more) == (outcome, wants_more)


def test_improvement_is_the_mirror_image_of_regression():
    worse, better = (
        judge(runs(1.04, 1.05), BASE, RULE),
        judge(runs(1 / 1.04, 1 / 1.05), runs(*(1 / r[0] for r in BASE)), RULE),
    )
    assert (worse.outcome, better.outcome) == ("regression", "improvement")
    assert math.log1p(worse.change) == pytest.approx(-math.log1p(better.change))


def test_two_runs_beyond_the_band_are_no_regression_while_chance_could_explain_them():
    noisy = runs(0.8, 0.9, 1.0, 1.1, 1.2)
    got = judge(runs(1.05, 1.05), noisy, RULE)
    assert got.outcome == "inconclusive"
    assert got.interval[0] < 0
    assert judge(runs(0.93, 0.93), noisy, RULE).outcome == "inconclusive"


def test_smallest_detectable_change_grows_with_the_noise_beyond_the_band():
    base = runs(0.8, 0.9, 1.0, 1.1, 1.2)
    got = judge(runs(1.0), base, RULE)
    se = got.noise * math.sqrt(1 / 5 + 1 / 3)
    t = scipy.stats.t(8 + 4 + 2)
    assert got.mde == pytest.approx(math.expm1((t.ppf(0.999) + t.ppf(0.9)) * se))
    assert got.mde > 0.3


def test_cold_load_may_take_five_runs():
    cold = RuleConstants.of(CATALOG.metrics["cold_load"])
    base = [[s] for s in (10, 10.2, 9.8, 10.1, 9.9)]
    alternating = [[12.5], [10.5], [12.0], [11.9], [11.9]]
    assert [judge(alternating[:k], base, cold).wants_more for k in (1, 2, 3, 4, 5)] == [True, True, True, True, False]


def test_the_simulation_settles_as_a_caller_that_measures_one_run_at_a_time():
    rng = np.random.default_rng(5)
    base = rng.lognormal(0, 0.01, (200, 5, 10))
    changes = rng.uniform(0.94, 1.06, (200, 1, 1))
    fresh = changes * rng.lognormal(0, 0.005, (200, 3, 1)) * rng.lognormal(0, 0.01, (200, 3, 10))
    settled = core.settle(core.run_scores(fresh), core.base_of_scores(core.run_scores(base)), RULE)
    names = {"inconclusive": core.INCONCLUSIVE, "pass": core.PASS, "regression": core.REGRESSION}
    names["improvement"] = core.IMPROVEMENT
    for row in range(200):
        for k in (1, 2, 3):
            one = judge(fresh[row, :k].tolist(), base[row].tolist(), RULE)
            if not one.wants_more:
                break
        assert names[one.outcome] == settled[row]
    assert set(settled) == set(names.values())


# ---- numbers that may not be judged ------------------------------------------------------------


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_numbers_are_errors_never_verdicts(bad):
    with pytest.raises(MeasurementError, match="run 2, round 3 of the measurement"):
        judge([[1.0] * 3, [1.0, 1.0, bad]], BASE, RULE)
    with pytest.raises(BaselineError, match="run 1, round 1 of the baseline"):
        judge(runs(1.0), [[bad]], RULE)
    with pytest.raises(BaselineError, match="summary"):
        judge(runs(1.0), Published(n=10, mean=bad, std=0.1), RULE)


@pytest.mark.parametrize("empty", [[], [[]]])
def test_empty_samples_are_errors(empty):
    with pytest.raises(MeasurementError):
        judge(empty, BASE, RULE)
    with pytest.raises(BaselineError):
        judge(runs(1.0), empty, RULE)


# ---- exact metrics ------------------------------------------------------------


def test_exact_counts_name_each_key_that_differs():
    got = judge_exact({"bfloat16": 10, "nvfp4": 6, "uint8": 1}, {"bfloat16": 12, "nvfp4": 6, "float32": 3})
    assert got.outcome == "changed"
    assert got.notes == ("bfloat16: 12 -> 10 (-2)", "float32: 3 -> absent", "uint8: absent -> 1")


def test_exact_equal_passes_and_one_byte_more_does_not():
    assert judge_exact(8, 8).outcome == "pass"
    assert judge_exact({"a": 1}, {"a": 1}).outcome == "pass"
    got = judge_exact(9, 8)
    assert (got.outcome, got.notes) == ("changed", ("8 -> 9 (+1)",))


def test_counts_that_move_between_keys_are_a_change_though_their_sum_is_equal():
    got = judge_exact({"plain": 3, "weight-only": 5}, {"plain": 5, "weight-only": 3})
    assert (got.outcome, got.change) == ("changed", 0.0)


@pytest.mark.parametrize("bad", [0, -1, True, {}, {"a": 0}])
def test_exact_refuses_what_counts_nothing(bad):
    with pytest.raises(MeasurementError):
        judge_exact(bad, 1)
    with pytest.raises(BaselineError):
        judge_exact(1, bad)


def test_exact_refuses_one_number_against_counts():
    with pytest.raises(BaselineError, match="counts by name"):
        judge_exact(1, {"a": 1})


# ---- control, words, record-time gate ------------------------------------------------------------


def test_control_cancels_what_slowed_the_whole_machine():
    fresh, control = runs(5.5 * 1.1, 5.5 * 1.1), runs(7.5 * 1.1, 7.5 * 1.1)
    base, control_base = runs(5.5, 5.5, 5.5, 5.5, 5.5), runs(7.5, 7.5, 7.5, 7.5, 7.5)
    assert judge(fresh, base, RULE).outcome == "regression"
    ratio = judge_control(fresh, base, control, control_base, RULE)
    assert ratio.outcome == "pass"
    assert ratio.value == pytest.approx(5.5 / 7.5)
    alone = judge_control(fresh, base, runs(7.5, 7.5), control_base, RULE)
    assert (alone.outcome, alone.change) == ("regression", pytest.approx(0.1))


def test_control_leaves_the_absolute_band_out_of_ratios():
    small, constants = [[200 * 2**20]], RuleConstants.of(RSS)
    assert judge(small, small * 5, constants).band == pytest.approx(0.32)
    assert judge_control(small, small * 5, small, small * 5, constants).band == 0.02


def test_control_pairs_runs_in_order_and_drops_those_without_partner():
    drifting = [5.5 * f for f in (1.0, 1.2, 0.9)]
    control = [7.5 * f for f in (1.0, 1.2)]
    ratio = judge_control(runs(*drifting), runs(*[5.5] * 5), runs(*control), runs(*[7.5] * 5), RULE)
    assert (ratio.outcome, ratio.k_new, ratio.change) == ("pass", 2, pytest.approx(0.0))


def test_control_of_published_figures_needs_both_published():
    ours, theirs = Published(n=10, mean=5.5, std=0.07), Published(n=10, mean=7.55, std=0.01)
    assert judge_control(runs(5.5), ours, runs(7.55), theirs, RULE).outcome == "pass"
    with pytest.raises(BaselineError, match="published"):
        judge_control(runs(5.5), ours, runs(7.55), runs(*[7.55] * 5), RULE)


def test_words():
    assert [word(o, WARM) for o in ("regression", "improvement")] == ["SLOWER", "FASTER"]
    assert [word(o, RSS) for o in ("regression", "improvement")] == ["BIGGER", "SMALLER"]
    others = ("pass", "inconclusive", "no-baseline", "unfit", "changed", "error")
    assert [word(o, WARM) for o in others] == ["PASS", "INCONCLUSIVE", "NO BASELINE", "UNFIT", "CHANGED", "ERROR"]


def test_record_time_gate_finds_the_run_that_stands_out():
    quiet = runs(1.0, 1.004, 0.996, 1.002, 0.998)
    spoilt = runs(2.0, 2.01, 1.99, 2.3, 2.004)
    assert runs_to_remeasure({"a": quiet, "b": spoilt}, WARM) == {"b": (3,)}
    assert runs_to_remeasure({"a": quiet}, WARM) == {}


def test_record_time_gate_forgives_less_than_five_floors_among_identical_runs():
    limit = math.exp(5 * WARM.floor)
    assert runs_to_remeasure({"a": runs(1, 1, 1, 1, limit * 0.999)}, WARM) == {}
    assert runs_to_remeasure({"a": runs(1, 1, 1, 1, limit * 1.001)}, WARM) == {"a": (4,)}


# ---- promises ------------------------------------------------------------


def test_simulation_keeps_the_promises(benchmark_module):
    rates = benchmark_module.flag_rates(20_000, seed=11)
    assert benchmark_module.violations(rates, benchmark_module.coverage(5_000, seed=11)) == []
    by_change = dict(zip(benchmark_module.CHANGES, rates["this rule, band 2 %"], strict=True))
    assert 0.35 < by_change[0.02] < 0.5
    assert by_change[0.03] > 0.95


@pytest.mark.parametrize("autocorrelation", [0.3, 0.9])
@pytest.mark.parametrize("outlier_mean", [0.05, 0.15])
def test_promises_do_not_hang_on_the_open_numbers_of_the_noise_model(
    benchmark_module, monkeypatch, autocorrelation, outlier_mean
):
    model = partial(benchmark_module.NoiseModel, autocorrelation=autocorrelation, outlier_mean=outlier_mean)
    monkeypatch.setattr(benchmark_module, "NoiseModel", model)
    rates = benchmark_module.flag_rates(20_000, seed=13)
    assert benchmark_module.violations(rates, benchmark_module.coverage(5_000, seed=13)) == []


def test_simulation_reproduces_the_naive_rules_as_specified(benchmark_module):
    rates = benchmark_module.flag_rates(20_000, seed=12)
    for name in ("mean > one run's + 3 %", "mean > one run's + 5 %"):
        assert [100 * rate for rate in rates[name]] == pytest.approx(benchmark_module.DOCUMENTED[name], abs=1.5)


@pytest.mark.parametrize(
    ("noise", "never_flags", "promise"), [(0.05, False, "false alarms"), (0.005, True, "power at +5 %")]
)
def test_benchmark_exits_nonzero_when_a_promise_is_broken(
    benchmark_module, monkeypatch, capsys, noise, never_flags, promise
):
    monkeypatch.setattr(benchmark_module, "NoiseModel", partial(benchmark_module.NoiseModel, between=noise))
    if never_flags:
        monkeypatch.setattr(core, "_beyond", lambda deviations, change, edge: change > math.inf)
    assert benchmark_module.main(["--replicates", "2000"]) == 1
    assert f"VIOLATED: band 3 %: {promise}" in capsys.readouterr().out


def test_importing_the_verdict_imports_no_numbers_library():
    code = (
        "import sys, pytest_zimage.verdict.rule, pytest_zimage.verdict.noise, pytest_zimage.verdict.metrics\n"
        "import pytest_zimage.baselines.update, pytest_zimage.baselines.compare\n"
        "print([m for m in ('numpy', 'scipy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
