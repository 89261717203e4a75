"""The published image scores of GB10: as printed, and judged by a rule that says how little they can find."""

import json
from pathlib import Path

import pytest
from msgspec import structs

from pytest_zimage.baselines import published
from pytest_zimage.baselines.compare_quality import compare_quality
from pytest_zimage.baselines.quality import Evidence, drawn_pairs, drawn_prompts
from pytest_zimage.baselines.schema import Key
from pytest_zimage.baselines.store import BaselineStore
from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import BaselineError, MeasurementError
from pytest_zimage.verdict.paired import Scores

ROOT = Path(__file__).parents[1]
CATALOG = load_catalog()
SET = CATALOG.prompt_set("quality-6x3")
CLIP_NAME = "open_clip/ViT-B-32/laion2b_s34b_b79k@0123456789ab"
SOURCE = "Z-Image Turbo part 2: LPIPS + CLIPScore"
PRINTED = {
    "bf16": (0.3344, 0.043, None, None, None),
    "fp8-scaled": (0.3356, 0.043, 0.167, 0.081, 0.27),
    "nvfp4": (0.3356, 0.045, 0.2886, 0.086, 0.39),
    "nvfp4-fp8e": (0.3388, 0.04, 0.3069, 0.093, 0.41),
}
"""CLIPScore mean and deviation, LPIPS mean and deviation, and the ceiling made of the last."""
CHINESE = {"bf16": 0.2642, "fp8-scaled": 0.2626, "nvfp4": 0.2658, "nvfp4-fp8e": 0.2731}


@pytest.fixture
def store(tmp_path):
    return BaselineStore(ROOT / "baselines", tmp_path, catalog=CATALOG, machine="here")


def key(variant):
    return Key(device="gb10", engine="comfyui", model_set="official", workload="turbo-1024", variant=variant)


def session(clip=None, lpips=None, more=0, **changes):
    """Images that score `clip[prompt]` and `lpips`, with the seeds around them."""
    pairs = drawn_pairs(SET, more)
    wobble = {pair: (-0.02, 0.02, 0.0)[i % 3] for i, pair in enumerate(pairs)}
    scores = {}
    if clip is not None:
        by_pair = {pair: clip[pair.rpartition("/")[0]] + wobble[pair] for pair in pairs}
        scores["clip_score"] = Scores(scorer=CLIP_NAME, by_pair=by_pair)
    if lpips is not None:
        by_pair = {pair: lpips + 4 * wobble[pair] for pair in pairs}
        scores["lpips"] = Scores(scorer="lpips/alex-v0.1@0123456789ab", by_pair=by_pair)
    fields = {
        "prompts": drawn_prompts(SET, CATALOG.workload("turbo-1024")),
        "pairs": pairs,
        "fingerprints": dict.fromkeys(pairs, "0" * 64),
        "scores": scores,
    }
    return Evidence(**{**fields, **changes})


def judge(store, variant, found, metric="clip_score"):
    return compare_quality(CATALOG.metrics[metric], found, store.find(key(variant), metric))


def by_prompt(store, variant, change=0.0):
    means = store.find(key(variant), "clip_score").metric.published.by_prompt
    return {prompt: mean + change for prompt, mean in means.items()}


@pytest.mark.parametrize("variant", PRINTED)
def test_figures_are_as_printed(store, variant):
    mean, std, lpips, lpips_std, ceiling = PRINTED[variant]
    found = store.find(key(variant), "clip_score")
    clip = found.metric.published
    assert (clip.n, clip.mean, clip.std, clip.seeds, clip.source) == (18, mean, std, (42, 7777, 12345), SOURCE)
    assert clip.by_prompt["chinese"] == CHINESE[variant]
    assert set(clip.by_prompt) == {prompt.name for prompt in SET.prompts}
    assert found.baseline.prompts == drawn_prompts(SET, CATALOG.workload("turbo-1024"))
    assert found.metric.scorer == "open_clip ViT-B-32"
    assert found.baseline.environment_of("clip_score") == {"hardware": "DGX Spark GB10"}
    if lpips is None:
        assert "lpips" not in found.baseline.metrics
    else:
        stored = store.find(key(variant), "lpips").metric
        assert (stored.published.mean, stored.published.std, stored.ceiling) == (lpips, lpips_std, ceiling)
        assert (stored.published.by_prompt, stored.scorer) == ({}, "lpips alex")


def test_variants_without_printed_scores_have_none(store):
    for variant in ("fp8-cast", "fp8-cast-fast"):
        assert "clip_score" not in store.find(key(variant), "warm_latency").baseline.metrics


def test_part_1_is_all_there(store):
    found = store.find(key("nvfp4"), "warm_latency")
    assert found.metric.published.mean == 5.5
    assert found.baseline.environment_of("warm_latency")["comfy-kitchen"] == "0.2.8"


@pytest.mark.parametrize("variant", PRINTED)
def test_scores_as_printed_pass_and_tell_what_they_cannot_find(store, variant):
    got = judge(store, variant, session(by_prompt(store, variant)))
    assert (got.outcome, got.k_base, got.k_new) == ("pass", 18, 18)
    assert "means of 6 prompts, not single images" in got.notes[-1]
    assert judge(store, variant, session(by_prompt(store, variant, -0.03))).outcome == "regression"


def test_every_other_variant_of_the_study_is_not_worse_than_bf16(store):
    for variant in ("fp8-scaled", "nvfp4", "nvfp4-fp8e"):
        got = judge(store, "bf16", session(by_prompt(store, variant)))
        assert got.outcome in ("pass", "inconclusive")


def test_lpips_finds_little_and_says_so(store):
    got = judge(store, "fp8-scaled", session(lpips=0.167), "lpips")
    assert got.outcome == "inconclusive"
    assert not got.wants_more
    assert "one mean +/- std of 18 images" in got.notes[-1]
    assert f"{got.mde:.2g} 8 times out of 10" in got.notes[-1]
    above = judge(store, "fp8-scaled", session(lpips=0.28), "lpips")
    assert above.outcome == "regression"
    assert "ceiling of 0.27" in above.notes[0]


def test_only_the_seeds_that_were_printed_count(store):
    clip = by_prompt(store, "nvfp4")
    more = session(clip, more=3)
    spoilt = {
        pair: 0.0 if pair.endswith("/101") else score for pair, score in more.scores["clip_score"].by_pair.items()
    }
    got = judge(store, "nvfp4", structs.replace(more, scores={"clip_score": Scores(scorer=CLIP_NAME, by_pair=spoilt)}))
    assert (got.outcome, got.k_new) == ("pass", 18)


def test_other_prompts_are_not_held_against_the_printed_mean(store):
    mine = CATALOG.prompt_set("vllm-3x1")
    pairs = drawn_pairs(mine)
    found = session(
        prompts=drawn_prompts(mine, CATALOG.workload("turbo-1024")),
        pairs=pairs,
        fingerprints=dict.fromkeys(pairs, "0" * 64),
        scores={"lpips": Scores(scorer="lpips/alex", by_pair=dict.fromkeys(pairs, 0.1))},
    )
    with pytest.raises(BaselineError, match=r"was printed for abstract, anime, chinese.*not for fisherman/1235"):
        judge(store, "nvfp4", found, "lpips")
    whole = session(by_prompt(store, "nvfp4"))
    fewer = tuple(pair for pair in whole.pairs if pair != "anime/42")
    scores = {pair: whole.scores["clip_score"].by_pair[pair] for pair in fewer}
    lacking = structs.replace(whole, pairs=fewer, scores={"clip_score": Scores(scorer=CLIP_NAME, by_pair=scores)})
    with pytest.raises(MeasurementError, match="anime/42 were printed and not drawn"):
        judge(store, "nvfp4", lacking)


def test_tiny_scorers_never_meet_printed_scores(store):
    found = session(by_prompt(store, "nvfp4"))
    tiny = Scores(scorer="tiny-open_clip/ViT-B-32/seeded@0", by_pair=found.scores["clip_score"].by_pair)
    got = judge(store, "nvfp4", structs.replace(found, scores={"clip_score": tiny}))
    assert got.outcome == "unfit"
    assert "tiny-open_clip" in got.notes[0]


def test_another_engine_is_shown_the_printed_score_and_where_it_is_from(store):
    reference = store.published_reference(structs.replace(key("nvfp4"), engine="diffusers"), "lpips")
    assert (reference.published.mean, reference.unit, reference.source) == (0.2886, "score", SOURCE)


# ---- the script ------------------------------------------------------------


def tables(tmp_path, **changes):
    row = {"warm_s": {"n": 1, "mean": 7.5}, "cold_s": 60.9, "rss_peak_gb": 21.6, "working_set_gb": 20.6}
    part1 = {"title": "part 1", "engine": "comfyui", "hardware": "box", "stack": {"torch": "2"}}
    part1["variants"] = {"bf16": row, "nvfp4": row}
    quality = {
        "title": "part 2",
        "engine": "comfyui",
        "hardware": "box",
        "seeds": [42, 7777, 12345],
        "prompts_as_printed": {prompt.name: prompt.text for prompt in SET.prompts},
        "overall": {
            "bf16": {"lpips": 0.0, "clip": {"mean": 0.33, "std": 0.04}},
            "nvfp4": {"lpips": {"mean": 0.2, "std": 0.1}, "clip": {"mean": 0.33, "std": 0.04}},
        },
        "clip_per_prompt_mean_of_3_seeds": {prompt.name: {"bf16": 0.33, "nvfp4": 0.33} for prompt in SET.prompts},
    }
    paths = tmp_path / "part1.json", tmp_path / "part2.json"
    for path, table in zip(paths, (part1, {**quality, **changes}), strict=True):
        path.write_text(json.dumps(table))
    return [str(paths[0]), str(tmp_path / "out"), "--quality", str(paths[1]), "--recorded-at", "2026-01-31"]


def test_the_script_writes_what_the_store_reads(tmp_path):
    assert published.main(tables(tmp_path)) == 0
    store = BaselineStore(tmp_path / "out", tmp_path / "local", catalog=CATALOG, machine="here")
    assert store.find(key("nvfp4"), "lpips").metric.ceiling == 0.3
    assert store.find(key("bf16"), "clip_score").metric.published.mean == 0.33
    assert store.find(key("bf16"), "warm_latency").metric.published.mean == 7.5


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seeds": [42]}, "is not what was printed: abstract, anime"),
        ({"prompts_as_printed": {"anime": "another text"}}, "is not what was printed"),
        ({"overall": {"int3": {"lpips": 0.0, "clip": {"mean": 0.3, "std": 0.1}}}}, "no baseline to add int3 to"),
        ({"overall": {"nvfp4": {"lpips": 0.2, "clip": {"mean": 0.3, "std": 0.1}}}}, "no standard deviation"),
        ({"overall": {}, "seeds": "42"}, "not such a table"),
    ],
)
def test_the_script_refuses_a_table_that_is_not_the_prompt_set(tmp_path, capsys, change, told):
    assert published.main(tables(tmp_path, **change)) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
