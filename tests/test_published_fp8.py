"""The published FP8 table of vLLM-Omni: as printed, both attention passes, and able to judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec import structs

from pytest_zimage.baselines import published_fp8
from pytest_zimage.baselines.compare import compare
from pytest_zimage.baselines.compare_quality import compare_quality
from pytest_zimage.baselines.quality import Evidence, drawn_pairs, drawn_prompts
from pytest_zimage.baselines.schema import Key
from pytest_zimage.baselines.store import Absent, BaselineStore
from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import BaselineError, MeasurementError
from pytest_zimage.verdict.metrics import Sample
from pytest_zimage.verdict.paired import Scores
from pytest_zimage.verdict.words import word

ROOT = Path(__file__).parents[1]
CATALOG = load_catalog()
SET = CATALOG.prompt_set("vllm-3x1")
WORKLOAD = CATALOG.workload("turbo-1024x512")
GIB = 2**30
SOURCE = "Z-Image-Turbo FP8 policies for vLLM-Omni"
SAGE = {
    "bf16": (7.831, 21.66, None, None),
    "online-fp8": (5.937, 13.34, 21.05, 0.7942),
    "modelopt-full": (6.163, 16.02, 20.58, 0.7645),
    "modelopt-ffn-attn-qkv": (6.007, 16.48, 20.99, 0.7766),
    "modelopt-ffn-attn-out": (6.4, 17.41, 19.76, 0.7634),
    "modelopt-ffn-only": (6.821, 17.88, 20.66, 0.7789),
    "modelopt-attn-only": (7.055, 19.74, 22.92, 0.8413),
    "modelopt-attn-qkv-only": (7.344, 20.21, 24.41, 0.8423),
    "modelopt-attn-out-only": (7.623, 21.18, 26.93, 0.9027),
}
"""Seconds an image, peak of the processes in GiB, PSNR and SSIM to bf16 of the same pass."""
SDPA = {
    "bf16": (7.145, 21.66, None, None),
    "online-fp8": (5.637, 13.32, None, None),
    "modelopt-full": (5.706, 16.03, None, None),
    "modelopt-ffn-attn-qkv": (5.208, 16.48, None, None),
}
PRINTED = {f"{name}-sage": row for name, row in SAGE.items()} | SDPA
SCORED = [name for name, row in PRINTED.items() if row[2] is not None]
PSNR_NAME = "scikit-image/psnr/data_range=255"
SSIM_NAME = "scikit-image/ssim/win_size=11,channel_axis=-1,data_range=255"


@pytest.fixture
def store(tmp_path):
    return BaselineStore(ROOT / "baselines", tmp_path, catalog=CATALOG, machine="here")


def key(variant):
    return Key(device="gb10", engine="vllm-omni", model_set="official", workload="turbo-1024x512", variant=variant)


def judge_runs(store, variant, metric, runs):
    row = CATALOG.metrics[metric]
    samples = [Sample(rounds=tuple(rounds)) for rounds in runs]
    got = compare(row, samples, store.find(key(variant), metric).metric, device=CATALOG.device("gb10"))
    return word(got.outcome, row)


def session(metric, values, scorer=None, **changes):
    """Images of the three prompts that score `values`."""
    pairs = drawn_pairs(SET)
    by_pair = dict(zip(pairs, values, strict=True))
    name = scorer or {"psnr": PSNR_NAME, "ssim": SSIM_NAME}[metric]
    fields = {
        "prompts": drawn_prompts(SET, WORKLOAD),
        "pairs": pairs,
        "fingerprints": dict.fromkeys(pairs, "0" * 64),
        "scores": {metric: Scores(scorer=name, by_pair=by_pair)},
    }
    return Evidence(**{**fields, **changes})


def judge_images(store, variant, metric, found):
    return compare_quality(CATALOG.metrics[metric], found, store.find(key(variant), metric))


def test_there_is_one_for_each_variant_of_both_passes_and_no_other():
    folder = ROOT / "baselines" / key("bf16").folder()
    assert {path.stem for path in folder.iterdir()} == set(PRINTED)
    assert set(PRINTED) <= set(CATALOG.variants)


CLAIMS = [claim for claim in CATALOG.claims.values() if claim.engine == "vllm-omni"]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_claims_print_what_the_baselines_of_their_variants_say(store, claim):
    """All of pass A: a figure under a variant of the other attention would be another measurement's."""
    assert len(CLAIMS) == 4
    unit = {"s": 1, "GiB": GIB}[claim.printed_unit]
    assert set(claim.measured()) == set(claim.printed)
    for variant, figure in claim.printed.items():
        published = store.find(key(variant), claim.metric).metric.published
        assert figure * unit == pytest.approx(published.mean, rel=1e-9)
        assert CATALOG.variant(variant).attention == "sage"


@pytest.mark.parametrize("variant", PRINTED)
def test_figures_are_as_printed(store, variant):
    seconds, peak, psnr, ssim = PRINTED[variant]
    warm = store.find(key(variant), "warm_latency")
    assert (warm.metric.published.n, warm.metric.published.mean, warm.metric.published.std) == (3, seconds, 0.0)
    assert (warm.baseline.provenance.kind, warm.baseline.provenance.source) == ("published", SOURCE)
    assert warm.baseline.environment == {
        "hardware": "NVIDIA GB10 (Grace Blackwell, SM 12.1)",
        "vllm-omni.attention": "SAGE_ATTN" if variant.endswith("-sage") else "TORCH_SDPA",
    }
    memory = store.find(key(variant), "gpu_process_peak").metric.published
    assert (memory.n, memory.mean) == (1, pytest.approx(peak * GIB, abs=1))
    for metric, printed in (("psnr", psnr), ("ssim", ssim)):
        found = store.find(key(variant), metric)
        if printed is None:
            assert isinstance(found, Absent)
            assert f"the published table has no {metric} for {variant}" in found.reason
        else:
            summary = found.metric.published
            assert (summary.n, summary.mean, summary.bare, summary.seeds) == (3, printed, True, (1235, 1236, 1237))
            assert found.baseline.prompts == drawn_prompts(SET, WORKLOAD)


@pytest.mark.parametrize(
    ("policy", "matrices"),
    [
        ("full", (4, 3)),
        ("ffn-only", (0, 3)),
        ("attn-only", (4, 0)),
        ("attn-qkv-only", (3, 0)),
        ("attn-out-only", (1, 0)),
        ("ffn-attn-qkv", (3, 3)),
        ("ffn-attn-out", (1, 3)),
    ],
)
def test_gib_is_the_unit_that_the_sums_of_weights_bear_out(policy, matrices):
    """Each FP8 weight saves a byte; what was printed is that, and up to 0.06 GiB of the allocator's blocks."""
    attention, feed_forward = matrices
    model = CATALOG.models["official"].transformer
    blocks = model["n_layers"] + 2 * model["n_refiner_layers"]
    saved = blocks * (attention * 3840**2 + feed_forward * 3840 * 10240)
    printed = SAGE["bf16"][1] - SAGE[f"modelopt-{policy}"][1]
    assert abs(printed - saved / GIB) < 0.06
    if saved > 1e9:
        assert abs(printed - saved / 1e9) > 0.05


def test_a_machine_that_draws_as_printed_passes_and_a_fifth_worse_fails(store):
    for variant, (seconds, peak, *_) in PRINTED.items():
        assert judge_runs(store, variant, "warm_latency", [[seconds] * 10]) == "PASS"
        assert judge_runs(store, variant, "gpu_process_peak", [[peak * GIB]]) == "PASS"
        assert judge_runs(store, variant, "warm_latency", [[seconds * 1.2] * 10] * 2) == "SLOWER"
        assert judge_runs(store, variant, "gpu_process_peak", [[peak * GIB * 1.2]] * 2) == "BIGGER"


def test_a_policy_that_is_not_quantised_is_bigger(store):
    assert judge_runs(store, "modelopt-full", "gpu_process_peak", [[21.66 * GIB]] * 2) == "BIGGER"


# ---- the image scores ------------------------------------------------------------


@pytest.mark.parametrize("variant", SCORED)
def test_scores_as_printed_pass_and_say_how_little_that_finds(store, variant):
    _, _, psnr, ssim = PRINTED[variant]
    for metric, mean, spread in (("psnr", psnr, 4.0), ("ssim", ssim, 0.08)):
        got = judge_images(store, variant, metric, session(metric, [mean - spread, mean + spread, mean]))
        assert (got.outcome, got.k_base, got.k_new) == ("pass", 3, 3)
        assert (got.value, got.baseline) == (pytest.approx(mean), mean)
        assert got.notes[-1].startswith("printed is one mean of 3 images without its spread")


@pytest.mark.parametrize(
    ("metric", "change", "outcome"),
    [
        ("psnr", -0.49, "pass"),
        ("psnr", -0.51, "inconclusive"),
        ("psnr", -4.99, "inconclusive"),
        ("psnr", -5.01, "regression"),
        ("psnr", 4.99, "pass"),
        ("psnr", 5.01, "improvement"),
        ("ssim", -0.019, "pass"),
        ("ssim", -0.021, "inconclusive"),
        ("ssim", -0.21, "regression"),
    ],
)
def test_between_margin_and_guard_no_answer_is_possible(store, metric, change, outcome):
    mean = store.find(key("online-fp8-sage"), metric).metric.published.mean
    got = judge_images(store, "online-fp8-sage", metric, session(metric, [mean + change] * 3))
    assert (got.outcome, got.wants_more, got.change) == (outcome, False, pytest.approx(change))


def test_every_prompt_has_its_own_seed_and_all_three_are_needed(store):
    whole = session("psnr", [21.0] * 3)
    fewer = whole.pairs[:2]
    scores = {"psnr": Scores(scorer=PSNR_NAME, by_pair=dict.fromkeys(fewer, 21.0))}
    with pytest.raises(MeasurementError, match="neon_city/1237 were printed and not drawn"):
        judge_images(store, "modelopt-full-sage", "psnr", structs.replace(whole, pairs=fewer, scores=scores))


def test_a_scorer_of_other_settings_is_not_held_against_the_table(store):
    other = session("ssim", [0.7] * 3, scorer="scikit-image/ssim/win_size=7,channel_axis=-1,data_range=255")
    assert judge_images(store, "modelopt-full-sage", "ssim", other).outcome == "unfit"


# ---- files that were tampered with ---------------------------------------------------


def damaged(tmp_path, change):
    path = tmp_path / "baselines" / key("modelopt-full-sage").path()
    path.parent.mkdir(parents=True)
    document = json.loads((ROOT / "baselines" / key("modelopt-full-sage").path()).read_text())
    change(document)
    path.write_text(json.dumps(document))
    return BaselineStore(tmp_path / "baselines", tmp_path, catalog=CATALOG, machine="here")


def printed(document):
    return document["metrics"]["psnr"]["published"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: printed(d).pop("bare"), "no standard deviation"),
        (lambda d: printed(d).update(std=1.0), "is set, though there is more than a mean"),
        (lambda d: printed(d).update(seeds=[]), "is empty; image scores are compared for the same seeds only"),
        (
            lambda d: printed(d).update(seeds=[1235, 1236]),
            "was printed for 3 images, and its prompts and seeds are of 2",
        ),
        (lambda d: d["prompts"].pop("neon_city"), "not for neon_city/1237"),
        (lambda d: d["metrics"]["warm_latency"]["published"].update(bare=True), "does not belong to a metric"),
    ],
)
def test_a_table_without_what_it_takes_is_an_error(tmp_path, change, says):
    store = damaged(tmp_path, change)
    with pytest.raises(BaselineError, match=says):
        judge_images(store, "modelopt-full-sage", "psnr", session("psnr", [20.58] * 3))


# ---- the script ------------------------------------------------------------------


def table(**changes):
    row = {"mean_latency_s": 6.0, "steps_per_s": 1.3, "peak_gpu_gb": 16.0, "psnr_db": 20.0, "ssim": 0.7}
    base = {**row, "psnr_db": None, "ssim": None}
    workload = {
        "width": 1024,
        "height": 512,
        "steps": 8,
        "guidance_scale": 0.0,
        "seeds": [1235, 1236, 1237],
        "prompts": [prompt.text for prompt in SET.prompts],
        "timed_runs": 3,
    }
    whole = {
        "title": "a table",
        "engine": "vllm-omni",
        "hardware": "a box",
        "workload": workload,
        "pass_a_SAGE_ATTN": {"bf16_base": base, "full": row},
        "pass_b_TORCH_SDPA": {"bf16_base": base},
    }
    return {**whole, **changes}


def script(tmp_path, document):
    source = tmp_path / "table.json"
    source.write_text(json.dumps(document))
    return published_fp8.main([str(source), str(tmp_path / "out"), "--recorded-at", "2026-01-31"])


def test_the_script_writes_what_the_store_reads(tmp_path, capsys):
    assert script(tmp_path, table()) == 0
    store = BaselineStore(tmp_path / "out", tmp_path / "local", catalog=CATALOG, machine="here")
    found = store.find(key("modelopt-full-sage"), "psnr")
    assert found.metric.published.mean == 20.0
    assert str(found.path) in capsys.readouterr().out
    assert store.find(key("bf16"), "gpu_process_peak").metric.published.mean == 16 * GIB
    assert isinstance(store.find(key("modelopt-full"), "warm_latency"), Absent)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({}, "not such a table"),
        (table(workload={**table()["workload"], "steps": 9}), "workload turbo-1024x512 is not what was printed"),
        (table(workload={**table()["workload"], "seeds": [1, 2, 3]}), "prompt set vllm-3x1 is not what was printed"),
        (table(workload={**table()["workload"], "seeds": [1235]}), "prompt set vllm-3x1 is not what was printed"),
        (table(pass_b_TORCH_SDPA={"int3": table()["pass_a_SAGE_ATTN"]["full"]}), "no variant modelopt-int3"),
    ],
)
def test_the_script_refuses_what_the_catalogue_does_not_say(tmp_path, capsys, document, says):
    assert script(tmp_path, document) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
