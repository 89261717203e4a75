"""Image quality as a baseline: what is stored, what is refused, and what a later session is told by it."""

import json
import math
from pathlib import Path

import pytest
from documents import changed
from loading import module_of
from msgspec import structs

from pytest_zimage.baselines import images, writing
from pytest_zimage.baselines.compare import compare, compare_to_control
from pytest_zimage.baselines.compare_quality import compare_quality, same_scorer
from pytest_zimage.baselines.merging import Fresh, merge_metric
from pytest_zimage.baselines.quality import Evidence, drawn_pairs, drawn_prompts, identity_to
from pytest_zimage.baselines.quality_update import MeasuredQuality, update_quality
from pytest_zimage.baselines.reading import parse_baseline
from pytest_zimage.baselines.recordable import Measured
from pytest_zimage.baselines.schema import BaseImages, Key, MetricBaseline, Published
from pytest_zimage.baselines.store import Absent, BaselineStore
from pytest_zimage.baselines.update import update_baselines
from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import BaselineError, MeasurementError
from pytest_zimage.verdict.metrics import Sample
from pytest_zimage.verdict.paired import Scores

CATALOG = load_catalog()
KEY = Key(device="gb10", engine="diffusers", model_set="official", workload="turbo-1024", variant="nvfp4")
SET = CATALOG.prompt_set("quality-6x3")
PROMPTS = drawn_prompts(SET, CATALOG.workload("turbo-1024"))
CLIP_NAME = "open_clip/ViT-B-32/laion2b_s34b_b79k@0123456789ab"
METRICS = ("clip_score", "lpips", "psnr", "ssim")
CENTRES = {"clip_score": 0.33, "lpips": 0.2, "psnr": 21.0, "ssim": 0.79}
NAMES = {"clip_score": CLIP_NAME, "lpips": "lpips/alex-v0.1@ab", "psnr": "skimage psnr", "ssim": "skimage ssim"}


def sha(text):
    return images.hashlib.sha256(text.encode()).hexdigest()


def evidence(more=0, build="a", metrics=METRICS, shift=0.0, changed=(), pairs=None, **changes):
    """A session's images; those in `changed`, or all of another `build`, have other pixels."""
    pairs = drawn_pairs(SET, more) if pairs is None else pairs
    scores = {
        name: Scores(scorer=NAMES[name], by_pair={p: CENTRES[name] + shift + 0.0001 * len(p) for p in pairs})
        for name in metrics
    }
    fields = {
        "prompts": PROMPTS,
        "pairs": pairs,
        "fingerprints": {pair: sha(pair + ("new" if pair in changed else build)) for pair in pairs},
        "scores": scores,
        "drawn_on": "GB10",
        "environment": {"torch": "2.11.0", "driver": "580"},
    }
    return Evidence(**{**fields, **changes})


def rescored(found, metric, **scores):
    """`found` with some scores of one metric replaced; keys are `prompt__seed`."""
    by_pair = {**found.scores[metric].by_pair, **{k.replace("__", "/"): v for k, v in scores.items()}}
    changed = structs.replace(found.scores[metric], by_pair=by_pair)
    return structs.replace(found, scores={**found.scores, metric: changed})


@pytest.fixture
def store(tmp_path):
    return BaselineStore(tmp_path / "baselines", tmp_path / "local", catalog=CATALOG, machine="here")


def update(store, found=None, mode="replace", key=KEY, metrics=METRICS, reason="first", at="2026-02-06T00:00:00+00:00"):
    one = MeasuredQuality(key=key, evidence=evidence() if found is None else found, metrics=metrics)
    rows = update_quality(store, CATALOG, [one], mode=mode, reason=reason, recorded_at=at)
    return {row.metric: row for row in rows}


def judge(store, found, metric="clip_score", key=KEY, **more):
    return compare_quality(CATALOG.metrics[metric], found, store.find(key, metric), **more)


def file_of(store, key=KEY):
    return store.locate(key, "images")[1]


# ---- what is stored ------------------------------------------------------------


def test_a_session_becomes_a_baseline_in_one_file(store):
    rows = update(store)
    assert {row.action for row in rows.values()} == {"recorded"}
    assert set(rows) == {*METRICS, "images"}
    assert (rows["clip_score"].old, rows["clip_score"].runs_new) == (None, 18)
    assert (rows["images"].unit, rows["images"].new) == ("count", 18)
    found = store.find(KEY, "clip_score")
    assert found.metric.scores == evidence().scores["clip_score"].by_pair
    assert (found.metric.scorer, found.metric.direction, found.metric.unit) == (CLIP_NAME, "higher", "score")
    assert found.baseline.images.fingerprints == evidence().fingerprints
    assert found.baseline.environment == {"torch": "2.11.0", "driver": "580"}
    assert store.find(KEY, "lpips").metric.ceiling == 0.31
    assert found.metric.ceiling is None
    assert found.layer == "device"
    assert store.images(KEY).images == found.baseline.images


def test_chinese_survives_the_file(store):
    update(store)
    assert "古風水墨畫,一位身穿青色長袍的書生站在竹林中" in file_of(store).read_text(encoding="utf-8")
    assert store.find(KEY, "lpips").baseline.prompts == PROMPTS


def test_scores_of_a_cpu_are_portable_with_their_fingerprints(store):
    key = structs.replace(KEY, device="cpu")
    update(store, key=key)
    found = store.find(key, "clip_score")
    assert (found.layer, found.path.parts[-3]) == ("portable", "portable")
    assert found.baseline.environment == {"torch": "2.11.0"}
    assert store.images(key).images.drawn_on == "GB10"


def test_equal_scores_change_no_file(store):
    update(store)
    stamp = file_of(store).stat().st_mtime_ns
    assert {row.action for row in update(store).values()} == {"unchanged"}
    assert file_of(store).stat().st_mtime_ns == stamp


def test_other_metrics_of_the_file_stay(store):
    warm = MetricBaseline(unit="s", published=Published(n=10, mean=5.5, std=0.1))

    def add_warm(current):
        return structs.replace(current, metrics={**current.metrics, "warm_latency": warm})

    update(store)
    store.rewrite(KEY, "device", add_warm)
    newer = structs.replace(evidence(build="b"), environment={"torch": "2.12.0"})
    update(store, newer)
    found = store.find(KEY, "warm_latency")
    assert found.metric.published == warm.published
    assert found.baseline.environment_of("warm_latency") == {"torch": "2.11.0", "driver": "580"}
    assert found.baseline.environment_of("clip_score") == {"torch": "2.12.0"}


def test_recording_timings_leaves_the_images_alone(store):
    runs = module_of("tests/test_baseline_update.py")
    update(store, evidence(previews=previews()))
    rows = update_baselines(
        store, CATALOG, [runs.measured()], mode="replace", reason="timings", recorded_at="2026-02-07"
    )
    assert {row.action for row in rows} == {"recorded"}
    found = store.find(KEY, "warm_latency").baseline
    assert found.images.fingerprints == evidence().fingerprints
    assert (found.prompts, len(found.metrics["lpips"].scores)) == (PROMPTS, 18)
    assert store.images(KEY).preview("abstract/42").read_bytes() == previews()["abstract/42"]


def test_extend_adds_further_seeds_and_keeps_the_first(store):
    update(store)
    rows = update(store, evidence(more=6, shift=0.001), mode="extend")
    assert {row.action for row in rows.values()} == {"extended"}
    assert (rows["clip_score"].runs_old, rows["clip_score"].runs_new) == (18, 54)
    stored = store.find(KEY, "clip_score")
    first = evidence().scores["clip_score"].by_pair
    assert {pair: stored.metric.scores[pair] for pair in first} == first
    assert len(stored.baseline.images.fingerprints) == 54
    assert judge(store, evidence(more=6)).notes == ("54 of 54 images bit-identical to baseline",)


def test_extend_with_nothing_to_add_keeps(store):
    update(store)
    rows = update(store, evidence(shift=0.005), mode="extend")
    assert rows["clip_score"].action == "kept"
    assert store.find(KEY, "clip_score").metric.scores == evidence().scores["clip_score"].by_pair


def test_new_leaves_what_is_there(store):
    update(store, metrics=("clip_score",))
    rows = update(store, evidence(build="b", shift=0.001), mode="new")
    assert (rows["clip_score"].action, rows["lpips"].action) == ("kept", "recorded")
    assert store.find(KEY, "clip_score").baseline.images.fingerprints == evidence().fingerprints


def test_replace_keeps_ceiling_and_margin(store):
    update(store)

    def by_hand(current):
        lpips = structs.replace(current.metrics["lpips"], ceiling=0.25, margin=0.03)
        return structs.replace(current, metrics={**current.metrics, "lpips": lpips})

    store.rewrite(KEY, "device", by_hand)
    update(store, evidence(build="b", shift=0.01))
    stored = store.find(KEY, "lpips").metric
    assert (stored.ceiling, stored.margin) == (0.25, 0.03)


def test_scores_of_an_unfit_prompt_are_left_out_and_told(store):
    row = update(store, evidence(unfit={"chinese": "noise wins"}))["clip_score"]
    assert (row.action, row.runs_new) == ("recorded", 15)
    assert "without chinese" in row.reason
    assert store.find(KEY, "clip_score").metric.unfit == ("chinese",)
    assert len(store.find(KEY, "lpips").metric.scores) == 18
    later = judge(store, evidence(build="b"))
    assert (later.outcome, later.k_new) == ("unfit", 15)
    assert "when the baseline was recorded" in later.notes[-1]


def test_infinite_psnr_is_stored_capped(store):
    update(store, rescored(evidence(), "psnr", abstract__42=math.inf))
    assert store.find(KEY, "psnr").metric.scores["abstract/42"] == 60.0


# ---- what is refused ------------------------------------------------------------


def refused(store, found, mode="replace", metrics=METRICS):
    """All rows refused, for one reason, and nothing written; returns the reason."""
    before = {path: path.read_bytes() for path in store.root("device").rglob("*.*")}
    rows = update(store, found, mode=mode, metrics=metrics)
    assert {row.action for row in rows.values()} == {"refused"}
    assert all(row.mend for row in rows.values())
    assert {path: path.read_bytes() for path in store.root("device").rglob("*.*")} == before
    assert len({row.reason for row in rows.values()}) == 1
    return next(iter(rows.values())).reason


def test_nothing_is_recorded_of(store):
    assert "injected" in refused(store, evidence(injected=True))
    assert "failing: abstract/42 is black" in refused(store, evidence(problems=("abstract/42 is black",)))
    lacking = tuple(pair for pair in drawn_pairs(SET) if pair != "anime/7777")
    assert "anime/7777 of the prompt set were not drawn" in refused(store, evidence(pairs=lacking))
    prints = {pair: sha(pair) for pair in lacking}
    assert "no fingerprint of anime/7777" in refused(store, evidence(fingerprints=prints))


def test_a_missing_or_impossible_score_refuses_its_metric_and_the_images(store):
    found = evidence()
    scores = {pair: score for pair, score in found.scores["lpips"].by_pair.items() if pair != "anime/42"}
    lacking = structs.replace(found, scores={**found.scores, "lpips": Scores(scorer="lpips", by_pair=scores)})
    rows = update(store, lacking)
    assert (rows["lpips"].action, rows["clip_score"].action) == ("refused", "recorded")
    assert "anime/42" in rows["lpips"].reason
    assert "images" not in rows
    assert "cannot be: anime/42 = -0.1" in update(store, rescored(found, "lpips", anime__42=-0.1))["lpips"].reason
    assert (
        "no numbers: anime/42" in update(store, rescored(found, "clip_score", anime__42=math.nan))["clip_score"].reason
    )


def test_a_scorer_that_is_unfit_for_every_prompt(store):
    blind = dict.fromkeys(PROMPTS, "noise wins")
    rows = update(store, evidence(unfit=blind))
    assert "can say nothing of any prompt" in rows["clip_score"].reason
    assert {rows[name].action for name in ("lpips", "images")} == {"recorded"}


def test_another_scorer_replaces_and_never_extends(store):
    update(store)
    found = evidence(more=3)
    tiny = Scores(scorer="tiny-open_clip/x@1", by_pair=found.scores["clip_score"].by_pair)
    other = structs.replace(found, scores={"clip_score": tiny})
    assert "tiny-open_clip" in refused(store, other, "extend", ("clip_score",))
    assert update(store, other, metrics=("clip_score",))["clip_score"].action == "recorded"


def test_a_mean_above_the_ceiling_is_for_a_person_to_allow(store):
    update(store)
    before = store.images(KEY).images
    rows = update(store, evidence(build="b", shift=0.15))
    assert rows["lpips"].action == "refused"
    assert "ceiling of 0.31" in rows["lpips"].reason
    assert "by hand" in rows["lpips"].mend
    assert store.images(KEY).images == before


def test_published_scores_are_replaced_and_never_extended(store):
    def publish(current):
        printed = Published(n=18, mean=0.33, std=0.04, seeds=(42, 7777, 12345), by_prompt=dict.fromkeys(PROMPTS, 0.33))
        stored = MetricBaseline(unit="score", direction="higher", scorer="open_clip ViT-B-32", published=printed)
        return structs.replace(current, metrics={"clip_score": stored})

    update(store)
    store.rewrite(KEY, "device", publish)
    assert "no scores to extend" in refused(store, evidence(more=3), "extend", ("clip_score",))
    assert update(store)["clip_score"].action == "recorded"


def test_another_text_under_the_same_name(store):
    update(store)
    other = {**PROMPTS, "anime": structs.replace(PROMPTS["anime"], text="something else")}
    for mode in ("extend", "new"):
        assert "'anime' has another text" in refused(store, evidence(more=3, prompts=other), mode)
    update(store, evidence(prompts=other), metrics=("clip_score",))
    found = store.find(KEY, "clip_score")
    assert found.baseline.prompts == other
    assert set(found.baseline.metrics) == {"clip_score"}


@pytest.mark.parametrize("reason", ["", "  "])
def test_no_reason_no_change(store, reason):
    with pytest.raises(BaselineError, match="only with a reason"):
        update(store, reason=reason)


def test_runs_and_image_scores_do_not_mix(store):
    row = update(store, metrics=("warm_latency",))["warm_latency"]
    assert (row.action, row.reason) == ("refused", "is sampled, not an image score")
    clip = CATALOG.metrics["clip_score"]
    sample = Sample(rounds=(0.3,))
    assert merge_metric(None, Fresh(metric=clip, samples=(sample,), recorded_at=("x",)), "replace").action == "refused"
    stored = MetricBaseline(unit="score")
    with pytest.raises(MeasurementError, match="no run says it"):
        compare(clip, [sample], stored, device=CATALOG.device("gb10"))
    assert compare_to_control(clip, [sample], stored, [sample], stored, device=CATALOG.device("gb10")) is None
    one = Measured(key=KEY, runs=(), metrics=("clip_score",), rounds_asked=1)
    rows = update_baselines(store, CATALOG, [one], mode="replace", reason="x", recorded_at="2026-02-07")
    assert [row.action for row in rows] == ["refused"]
    update(store)
    with pytest.raises(MeasurementError, match="not an image score"):
        compare_quality(CATALOG.metrics["warm_latency"], evidence(), store.find(KEY, "clip_score"))


# ---- judged against what was stored ------------------------------------------------------------


def test_bit_identical_images_end_the_argument(store):
    update(store)
    for metric in METRICS:
        got = judge(store, evidence(), metric)
        assert (got.outcome, got.notes) == ("pass", ("18 of 18 images bit-identical to baseline",))
        assert got.value == pytest.approx(got.baseline)
    blind = evidence(unfit={"chinese": "noise wins"})
    assert judge(store, blind).outcome == "pass"
    assert judge(store, structs.replace(evidence(), scores={})).value is None


def test_images_that_differ_are_counted_and_judged_by_their_scores(store):
    update(store)
    changed = ("abstract/42", "anime/7777")
    same = judge(store, evidence(changed=changed))
    assert same.outcome == "pass"
    assert same.notes[0] == "16 of 18 images bit-identical to baseline; differing: anime/7777, abstract/42"
    broken = rescored(evidence(changed=changed), "clip_score", abstract__42=0.1)
    worse = judge(store, broken)
    assert worse.outcome == "regression"
    assert worse.notes[0] == same.notes[0]
    assert judge(store, evidence(build="b", shift=-0.02)).outcome == "regression"


def test_another_machine_may_explain_last_bits(store):
    update(store)
    note = judge(store, evidence(build="b", drawn_on="H200")).notes[0]
    assert note.startswith("0 of 18 images bit-identical")
    assert note.endswith("recorded on GB10, drawn on H200, which may explain last bits")


def test_fingerprints_of_other_images_than_the_scores_end_no_argument(store):
    update(store)
    update(store, evidence(build="b", shift=0.005), metrics=("clip_score",))
    assert judge(store, evidence(build="b", shift=-0.03)).outcome == "pass"
    got = judge(store, evidence(build="b", shift=0.05), "lpips")
    assert got.outcome == "regression"
    assert got.notes[0].startswith("18 of 18 images bit-identical")


def test_scores_of_another_scorer_are_never_compared(store):
    update(store)
    tiny = Scores(scorer="tiny-open_clip/ViT@0", by_pair=evidence().scores["clip_score"].by_pair)
    found = evidence(build="b")
    got = judge(store, structs.replace(found, scores={**found.scores, "clip_score": tiny}))
    assert (got.outcome, got.value) == ("unfit", None)
    assert CLIP_NAME in got.notes[0]
    assert "tiny-open_clip/ViT@0" in got.notes[0]
    assert judge(store, structs.replace(evidence(), scores={"clip_score": tiny})).value is None


def test_controls_matter_to_the_scorer_they_test(store):
    update(store)
    blind = evidence(build="b", unfit={"chinese": "noise wins", "elsewhere": "not drawn"})
    got = judge(store, blind)
    assert (got.outcome, got.k_new) == ("unfit", 15)
    assert [note for note in got.notes if "elsewhere" in note] == []
    assert judge(store, blind, "lpips").outcome == "pass"
    worse = evidence(build="b", shift=-0.02, unfit={"chinese": "noise wins"})
    assert judge(store, worse).outcome == "regression"


def noisy(more=0):
    found = evidence(more=more, build="b")
    shifts = {p: (0.03 if i % 2 else -0.03) for i, p in enumerate(found.pairs)}
    scores = {pair: score + shifts[pair] for pair, score in found.scores["clip_score"].by_pair.items()}
    return structs.replace(found, scores={"clip_score": Scores(scorer=CLIP_NAME, by_pair=scores)})


def test_further_seeds_are_wanted_where_the_baseline_has_them(store):
    further = tuple(pair for pair in drawn_pairs(SET, 3) if pair not in drawn_pairs(SET))
    update(store)
    first = judge(store, noisy(), further=further)
    assert (first.outcome, first.wants_more) == ("inconclusive", False)
    assert "--update-mode extend" in first.notes[-1]
    update(store, evidence(more=6), mode="extend")
    assert judge(store, noisy(), further=further).wants_more
    last = judge(store, noisy(more=6))
    assert (last.outcome, last.k_new, last.wants_more) == ("pass", 54, False)


def test_a_pair_missing_on_either_side_is_an_error(store):
    update(store)
    found = evidence(build="b")
    lacking = {pair: score for pair, score in found.scores["lpips"].by_pair.items() if pair != "anime/42"}
    with pytest.raises(MeasurementError, match="no score of anime/42"):
        judge(
            store,
            structs.replace(found, scores={"lpips": Scores(scorer="lpips/alex-v0.1@ab", by_pair=lacking)}),
            "lpips",
        )
    with pytest.raises(BaselineError, match="no score of photo_woman/101"):
        judge(store, evidence(more=3, build="b"))
    with pytest.raises(MeasurementError, match="nothing scored"):
        judge(store, structs.replace(found, scores={}))
    with pytest.raises(MeasurementError, match="no fingerprint of anime/42"):
        judge(
            store, structs.replace(found, fingerprints={p: s for p, s in found.fingerprints.items() if p != "anime/42"})
        )
    fewer = tuple(pair for pair in found.pairs if not pair.startswith("anime"))
    with pytest.raises(MeasurementError, match="scores of anime, which were not drawn"):
        judge(store, evidence(build="b", pairs=fewer))
    stray = rescored(found, "clip_score", nobody__1=0.3)
    with pytest.raises(MeasurementError, match="not asked for: nobody/1"):
        judge(store, stray)


@pytest.mark.parametrize("field", [{"text": "other"}, {"width": 512}, {"seeds": (42, 7777)}])
def test_a_prompt_that_changed_is_another_measurement(store, field):
    update(store)
    other = {**PROMPTS, "chinese": structs.replace(PROMPTS["chinese"], **field)}
    with pytest.raises(BaselineError, match="prompt 'chinese' was recorded as '古風"):
        judge(store, evidence(prompts=other))


def test_two_prompt_sets_in_one_file(store):
    update(store)
    mine = CATALOG.prompt_set("vllm-3x1")
    prompts, pairs = drawn_prompts(mine, CATALOG.workload("turbo-1024")), drawn_pairs(mine)
    assert {(prompt.width, prompt.height) for prompt in prompts.values()} == {(1024, 512)}
    update(store, evidence(prompts=prompts, pairs=pairs), mode="extend")
    for found in (evidence(), evidence(prompts=prompts, pairs=pairs)):
        assert judge(store, found).outcome == "pass"


def test_metrics_that_need_not_be_there(store):
    update(store, metrics=("clip_score",))
    assert isinstance(store.find(KEY, "psnr"), Absent)
    with pytest.raises(BaselineError, match="has no metric 'lpips'"):
        store.find(KEY, "lpips")


def test_no_images_recorded(store):
    assert store.images(KEY) is None
    update(store)
    bare = structs.replace(store.find(KEY, "clip_score").baseline, images=None)
    assert identity_to(evidence(), bare) is None


@pytest.mark.parametrize(
    ("printed", "ours", "same"),
    [
        ("open_clip ViT-B-32", CLIP_NAME, True),
        ("open_clip ViT-B-32", "open_clip/ViT-B-16/laion2b@0", False),
        ("open_clip ViT-B-32", "open_clip/ViT-B-32-quickgelu/openai@0", False),
        ("open_clip ViT-B-32", "tiny-open_clip/ViT-B-32/seeded@0", False),
        ("lpips alex", "lpips/alex-v0.1@0123456789ab", True),
        ("lpips alex", "tiny-lpips/alex-v0.1@0123456789ab", False),
        ("", CLIP_NAME, False),
    ],
)
def test_a_printed_scorer_is_known_by_its_words(printed, ours, same):
    published = Published(n=18, mean=0.3, std=0.1)
    assert same_scorer(MetricBaseline(unit="score", scorer=printed, published=published), ours) is same
    assert not same_scorer(MetricBaseline(unit="score", scorer=printed, scores={"a/1": 0.3}), ours)


# ---- previews ------------------------------------------------------------


def previews(size=2000, pairs=None, fill=b"x"):
    names = drawn_pairs(SET) if pairs is None else pairs
    return {pair: b"RIFF" + pair.encode() + fill * size for pair in names}


def test_previews_are_kept_beside_and_replaced_whole(store):
    update(store, evidence(previews=previews()))
    found = store.images(KEY)
    assert found.preview("chinese/42").read_bytes() == previews()["chinese/42"]
    assert found.preview("chinese/42").parent.name == "nvfp4.previews"
    assert found.preview("chinese/1") is None
    newer = previews(fill=b"y")
    update(store, evidence(build="b", previews=newer))
    folder = images.previews_folder(file_of(store))
    assert len(list(folder.iterdir())) == 18
    assert store.images(KEY).preview("chinese/42").read_bytes() == newer["chinese/42"]
    update(store, evidence(build="c"))
    assert not folder.exists()


def test_extend_keeps_the_previews_of_the_first_seeds(store):
    update(store, evidence(previews=previews()))
    further = drawn_pairs(SET, 3)
    update(store, evidence(more=3, previews=previews(pairs=further, fill=b"y")), mode="extend")
    found = store.images(KEY)
    assert found.preview("chinese/42").read_bytes() == previews()["chinese/42"]
    assert len(found.images.previews) == 36


@pytest.mark.parametrize(
    ("data", "why"), [(b"RIFF" + b"x" * 8192, "8196 bytes, at most 8192"), (b"BM" + b"x", "no JPEG, PNG or WebP")]
)
def test_previews_too_large_or_of_another_kind(store, data, why):
    assert why in refused(store, evidence(previews={"anime/42": data}))


def test_previews_of_a_device_class_have_a_limit(store, monkeypatch):
    monkeypatch.setattr(images, "CLASS_BYTES", 80_000)
    update(store, evidence(previews=previews()))
    other = structs.replace(KEY, variant="bf16", workload="turbo-tiny")
    rows = update(store, evidence(previews=previews(3000)), key=other)
    assert {row.action for row in rows.values()} == {"refused"}
    assert "at most 80000 are kept" in rows["clip_score"].reason
    assert not file_of(store, other).exists()
    assert update(store, evidence(previews=previews(4000)))["images"].action == "recorded"
    elsewhere = structs.replace(KEY, device="h200")
    assert update(store, evidence(previews=previews()), key=elsewhere)["images"].action == "recorded"


def test_a_full_disk_leaves_the_old_baseline_and_its_previews(store, monkeypatch):
    update(store, evidence(previews=previews()))
    replace = writing.os.replace

    def full(source, target):
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(writing.os, "replace", full)
    rows = update(store, evidence(build="b", previews=previews(fill=b"y")))
    assert {row.action for row in rows.values()} == {"refused"}
    assert store.find(KEY, "clip_score").baseline.images.fingerprints == evidence().fingerprints
    assert store.images(KEY).preview("chinese/42").read_bytes() == previews()["chinese/42"]


# ---- what a file may hold ------------------------------------------------------------


@pytest.fixture
def document(store):
    update(store, evidence(previews=previews()))
    return json.loads(file_of(store).read_bytes())


def parse(document):
    return parse_baseline(json.dumps(document).encode(), file_of_key(), KEY, CATALOG.metrics)


def file_of_key():
    return Path("baselines") / KEY.path()


def test_written_and_read_again_it_is_the_same_to_the_byte(document):
    first = writing.to_bytes(parse(document))
    assert writing.to_bytes(parse(json.loads(first))) == first


CLIP = "metrics.clip_score"


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        (f"{CLIP}.scores.anime/42", math.nan, f"{CLIP}.scores.anime/42"),
        (f"{CLIP}.scores.anime/42", 1.5, f"{CLIP}.scores.anime/42"),
        (f"{CLIP}.scores.anime/42", "0.3", f"{CLIP}.scores"),
        (f"{CLIP}.scores.anime", 0.3, f"{CLIP}.scores.anime"),
        (f"{CLIP}.scores.anime/042", 0.3, f"{CLIP}.scores.anime/042"),
        (f"{CLIP}.scores.nobody/42", 0.3, f"{CLIP}.scores.nobody/42"),
        (f"{CLIP}.scores", {}, CLIP),
        (f"{CLIP}.scores", ..., CLIP),
        (f"{CLIP}.published", {"n": 18, "mean": 0.3, "std": 0.1, "seeds": [1]}, CLIP),
        (f"{CLIP}.exact", 3, CLIP),
        (f"{CLIP}.scorer", ..., f"{CLIP}.scorer"),
        (f"{CLIP}.scorer", " ", f"{CLIP}.scorer"),
        (f"{CLIP}.direction", "lower", f"{CLIP}.direction"),
        (f"{CLIP}.direction", ..., f"{CLIP}.direction"),
        (f"{CLIP}.unit", "dB", f"{CLIP}.unit"),
        (f"{CLIP}.margin", 0, f"{CLIP}.margin"),
        (f"{CLIP}.margin", math.inf, f"{CLIP}.margin"),
        (f"{CLIP}.ceiling", 0.5, f"{CLIP}.ceiling"),
        (f"{CLIP}.band", {"relative": 0.03}, f"{CLIP}.band"),
        (f"{CLIP}.images", "abc", f"{CLIP}.images"),
        (f"{CLIP}.unfit", ["anime"], f"{CLIP}.unfit"),
        (f"{CLIP}.unfit", ["nobody"], CLIP),
        (f"{CLIP}.colour", 1, CLIP),
        ("metrics.lpips.ceiling", -1, "metrics.lpips.ceiling"),
        ("metrics.lpips.scores.anime/42", -0.1, "metrics.lpips.scores.anime/42"),
        ("metrics.psnr.scores.anime/42", 61.0, "metrics.psnr.scores.anime/42"),
        ("images.fingerprints.anime/42", "0" * 63, "images.fingerprints.anime/42"),
        ("images.fingerprints.anime/42", "G" * 64, "images.fingerprints.anime/42"),
        ("images.fingerprints.nobody/1", "0" * 64, "images.fingerprints.nobody/1"),
        ("images.fingerprints", {}, "images.fingerprints"),
        ("images.previews.anime/42", "../../secret.png", "images.previews.anime/42"),
        ("images.previews.anime/42", "a.exe", "images.previews.anime/42"),
        ("images.previews.anime/1", "a.png", "images.previews.anime/1"),
        ("images.colour", 1, "images"),
        ("prompts.anime", ..., "metrics.clip_score.scores.anime/12345"),
        ("prompts.anime.text", " ", "prompts.anime.text"),
        ("prompts.anime.seeds", [], "prompts.anime.seeds"),
        ("prompts.anime.seeds", [1, 1], "prompts.anime.seeds"),
        ("prompts.anime.width", 0, "prompts.anime"),
        ("prompts.anime.colour", 1, "prompts"),
    ],
)
def test_every_mistake_names_its_field(document, where, value, named):
    with pytest.raises(BaselineError) as caught:
        parse(changed(document, where, value))
    assert f"field '{named}" in caught.value.message
    assert caught.value.mend


@pytest.mark.parametrize("field", [{"scorer": "x"}, {"margin": 1.0}, {"ceiling": 1.0}, {"unfit": ["a"]}])
def test_fields_of_image_scores_belong_nowhere_else(document, field):
    warm = {"unit": "s", "runs": [{"rounds": [1.0], "recorded_at": "2026-01-31"}], **field}
    with pytest.raises(BaselineError, match=rf"metrics.warm_latency.{next(iter(field))}.*metric that is sampled"):
        parse(changed(document, "metrics.warm_latency", warm))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seeds": []}, "seeds"),
        ({"mean": 0.34}, "by_prompt"),
        ({"by_prompt": {"anime": 0.33, "nobody": 0.33}}, "nobody"),
        ({"by_prompt": {"anime": 1.33}}, "by_prompt.anime"),
    ],
)
def test_printed_scores(document, change, named):
    printed = {"n": 18, "mean": 0.33, "std": 0.04, "seeds": [42], "by_prompt": {"anime": 0.33}}
    row = {"unit": "score", "direction": "higher", "scorer": "open_clip", "published": printed}
    sound = parse(changed(document, "metrics.clip_score", row))
    assert sound.metrics["clip_score"].published.by_prompt == {"anime": 0.33}
    with pytest.raises(BaselineError, match=named):
        parse(changed(document, "metrics.clip_score", {**row, "published": {**printed, **change}}))


def test_an_unreadable_file_is_an_error_for_its_images_too(store):
    update(store)
    file_of(store).write_text("{")
    with pytest.raises(BaselineError, match="not JSON"):
        store.images(KEY)


def test_digest_is_of_all_pairs_or_of_none():
    prints = BaseImages(fingerprints={"a/1": "x", "b/1": "y"}).fingerprints
    assert images.digest(prints, ["b/1", "a/1"]) == images.digest(prints, ["a/1", "b/1"])
    assert images.digest(prints, ["a/1"]) != images.digest(prints, ["a/1", "b/1"])
    assert images.digest(prints, ["a/1", "c/1"]) == images.digest(prints, []) == ""
