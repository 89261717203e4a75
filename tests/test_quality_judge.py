"""The judge: a process of its own that scores images on disk, dies loudly, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from msgspec.structs import replace
from PIL import Image

from pytest_zimage.engines.protocol import encode
from pytest_zimage.errors import CheckpointError, EngineError, MeasurementError, MissingFileError
from pytest_zimage.quality.client import Judge
from pytest_zimage.quality.images import pixels_sha256
from pytest_zimage.quality.protocol import (
    Comparison,
    ControlPrompt,
    ImageScore,
    Item,
    PathPair,
    PreviewJob,
    Ready,
    Scored,
    Scorer,
    ScorerChoice,
)

CHINESE = "古風水墨畫,一位身穿青色長袍的書生站在竹林中"


def silent(stage: str, done: int, total: int) -> None:
    pass


def draw(path: Path, seed: int, size: tuple[int, int] = (96, 96)) -> str:
    """A picture that its seed decides; the hash of its pixels."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / 16.0
    random = np.random.RandomState(seed)
    shapes = [np.sin(x * random.rand() * 3 + seed) * np.cos(y * random.rand() * 3) for _ in range(3)]
    pixels = (128 + 90 * np.stack(shapes, axis=2) + random.normal(0, 6, (*x.shape, 3))).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels_sha256(pixels)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The real judge with the tiny scorers, opened once."""
    with Judge(
        ScorerChoice(), log=tmp_path_factory.mktemp("judge") / "judge.log", timeout_s=120, progress=silent
    ) as opened:
        yield opened
        pid = opened.ready().pid
        opened.close()
        assert not psutil.pid_exists(pid)


@pytest.fixture
def items(tmp_path) -> list[Item]:
    """Three images, each with a reference that differs."""
    made = []
    for seed in (1, 2, 3):
        path, reference = tmp_path / f"{seed}.png", tmp_path / f"reference-{seed}.png"
        made.append(
            Item(
                prompt="chinese",
                text=CHINESE,
                seed=seed,
                path=str(path),
                pixels_sha256=draw(path, seed),
                reference=str(reference),
                reference_sha256=draw(reference, seed + 10),
                size=(96, 96),
            )
        )
    return made


# ---- what it answers -----------------------------------------------------


def test_it_names_its_scorers(judge):
    ready = judge.ready()
    assert [scorer.name for scorer in ready.scorers] == ["clip_score", "lpips", "psnr_db", "ssim"]
    assert ready.identity("clip_score").startswith("tiny-open_clip/")
    assert ready.identity("lpips").startswith("tiny-lpips/")
    assert ready.identity("ssim") == "scikit-image/ssim/win_size=11,channel_axis=-1,data_range=255"
    assert {"torch", "device", "pillow", "threads"} <= set(ready.environment)


def test_scores_come_back_in_order_with_everything(judge, items):
    scores = judge.score(items)
    assert [(score.prompt, score.seed, score.path) for score in scores] == [(i.prompt, i.seed, i.path) for i in items]
    assert [score.pixels_sha256 for score in scores] == [item.pixels_sha256 for item in items]
    assert len({score.clip_score for score in scores}) == 3
    for score in scores:
        assert -1 <= score.clip_score <= 1
        assert score.against.lpips > 0.05
        assert 5 < score.against.psnr_db < 30
        assert -1 <= score.against.ssim < 0.9
        assert not score.against.identical
        assert (score.findings, score.tokens_lost) == ((), 0)


def test_the_order_and_the_batch_do_not_matter(judge, items):
    forward = judge.score(items)
    backward = judge.score(items[::-1])[::-1]
    alone = [judge.score([item])[0] for item in items]
    for one, two, three in zip(forward, backward, alone, strict=True):
        assert one.clip_score == pytest.approx(two.clip_score, abs=1e-6)
        assert one.clip_score == pytest.approx(three.clip_score, abs=1e-6)
        assert one.against.lpips == pytest.approx(three.against.lpips, abs=1e-6)


def test_more_images_than_a_batch_and_of_two_sizes(judge, tmp_path):
    items = []
    for seed in range(19):
        size = (96, 64) if seed % 2 else (64, 96)
        one, other = tmp_path / f"{seed}.png", tmp_path / f"r{seed}.png"
        draw(one, seed, size), draw(other, seed + 50, size)
        items.append(Item("p", "t", seed, str(one), reference=str(other), size=size))
    scores = judge.score(items)
    assert [score.seed for score in scores] == list(range(19))
    single = judge.score([items[7]])[0]
    assert scores[7].against.lpips == pytest.approx(single.against.lpips, abs=1e-6)
    assert scores[7].clip_score == pytest.approx(single.clip_score, abs=1e-6)


def test_an_image_against_itself(judge, items):
    itself = replace(items[0], reference=items[0].path, reference_sha256="")
    (score,) = judge.score([itself])
    assert score.against == Comparison(True, 0.0, None, 1.0, 0.0, 0)


def test_without_a_reference_there_is_no_comparison(judge, items):
    (score,) = judge.score([replace(items[0], reference="", reference_sha256="")])
    assert score.against is None
    assert score.clip_score is not None


def test_a_black_image_is_found_whatever_its_score(judge, items):
    Image.new("RGB", (96, 96)).save(items[1].path)
    scores = judge.score([replace(item, pixels_sha256="") for item in items])
    assert {"uniform", "black"} <= {finding.check for finding in scores[1].findings}
    assert (scores[0].findings, scores[2].findings) == ((), ())


def test_a_prompt_beyond_the_limit_is_counted(judge, items):
    (score,) = judge.score([replace(items[0], text="cat " * 100)])
    assert score.tokens_lost == 102 - 77


def test_compare(judge, items):
    pairs = [PathPair(item.path, item.reference) for item in items] + [PathPair(items[0].path, items[0].path)]
    compared = judge.compare(pairs)
    assert compared[:3] == tuple(score.against for score in judge.score(items))
    assert compared[3].identical


def test_controls_use_the_next_prompts_images(judge, tmp_path):
    prompts = []
    for index, name in enumerate(("one", "two", "three")):
        paths = [tmp_path / f"{name}-{seed}.png" for seed in (1, 2)]
        for seed, path in enumerate(paths):
            draw(path, 10 * index + seed)
        prompts.append(ControlPrompt(name, f"a picture of {name}", tuple(map(str, paths))))
    scores = judge.controls(prompts)
    assert [(score.prompt, score.other_prompt) for score in scores] == [
        ("one", "two"),
        ("two", "three"),
        ("three", "one"),
    ]
    items = [Item("two", prompts[0].text, 1, path) for path in prompts[1].paths]
    assert scores[0].other == pytest.approx([score.clip_score for score in judge.score(items)], abs=1e-6)
    assert len({*scores[0].real, *scores[0].black, *scores[0].noise}) == 4
    assert judge.controls(prompts) == scores
    assert judge.controls(prompts, noise_seed=1)[0].noise != scores[0].noise


def test_controls_of_a_single_prompt_and_of_none(judge, items):
    (score,) = judge.controls([ControlPrompt("p", "t", (items[0].path,))])
    assert (score.other, score.other_prompt) == ((), "")
    with pytest.raises(MeasurementError, match="controls of p: no image was given"):
        judge.controls([ControlPrompt("p", "t", ())])


@pytest.mark.parametrize("ending", ["webp", "jpg", "png"])
def test_previews_fit_and_show_the_image(judge, tmp_path, ending):
    draw(tmp_path / "large.png", 5, (640, 320))
    target = tmp_path / f"preview.{ending}"
    (preview,) = judge.preview([PreviewJob(str(tmp_path / "large.png"), str(target))])
    assert preview.bytes == target.stat().st_size <= 8192
    assert preview.width == pytest.approx(2 * preview.height, abs=1)
    small = np.asarray(Image.open(target).convert("RGB"), float)
    large = np.asarray(Image.open(tmp_path / "large.png").resize(small.shape[1::-1], Image.Resampling.LANCZOS), float)
    assert np.abs(small - large).mean() < 12
    assert os.listdir(tmp_path).count(target.name) == 1
    assert not list(tmp_path.glob(".*.part"))


def test_previews_that_cannot_be(judge, items, tmp_path):
    with pytest.raises(MeasurementError, match=r"preview.gif: no preview format"):
        judge.preview([PreviewJob(items[0].path, str(tmp_path / "preview.gif"))])
    with pytest.raises(MeasurementError, match=r"1.png: no preview of it fits into 100 bytes"):
        judge.preview([PreviewJob(items[0].path, str(tmp_path / "preview.png"))], limit_bytes=100)
    assert not (tmp_path / "preview.png").exists()


# ---- bad input: the file is named, and the judge goes on ------------------


def _remove(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def _resize(path: Path) -> None:
    draw(path, 1, (64, 96))


def _repaint(path: Path) -> None:
    draw(path, 77)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_remove, MissingFileError, "the image is not there"),
        (_truncate, MeasurementError, "cannot be read as an image"),
        (_resize, MeasurementError, "it is 64x96 where 96x96 was asked for"),
        (_repaint, MeasurementError, "its pixels hash to"),
    ],
)
@pytest.mark.parametrize("which", ["path", "reference"])
def test_bad_images_are_named(judge, items, damage, kind, message, which):
    path = getattr(items[1], which)
    pid = judge.ready().pid
    damage(Path(path))
    with pytest.raises(kind) as caught:
        judge.score(items)
    assert f"quality judge: {path}: {message}" in str(caught.value)
    assert caught.value.mend
    assert len(judge.score(items[:1])) == 1
    assert judge.ready().pid == pid


def test_a_reference_of_another_size_names_both(judge, items):
    draw(Path(items[0].reference), 1, (64, 96))
    item = replace(items[0], size=None, reference_sha256="")
    with pytest.raises(MeasurementError) as caught:
        judge.score([item])
    assert f"{item.path}: it is 96x96, its reference {item.reference} is 64x96" in caught.value.message


# ---- scorers that cannot be opened ---------------------------------------


@pytest.mark.parametrize(
    ("choice", "kind", "message"),
    [
        (ScorerChoice(clip="ViT-B-32", lpips=""), MissingFileError, "CLIP weights of ViT-B-32:laion2b_s34b_b79k"),
        (ScorerChoice(clip="ViT-B-32:{}/broken.safetensors", lpips=""), CheckpointError, "broken.safetensors"),
    ],
)
def test_unusable_scorers_are_one_error_and_no_second_attempt(tmp_path, monkeypatch, items, choice, kind, message):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    choice = replace(choice, clip=choice.clip.format(tmp_path))
    with Judge(choice, log=tmp_path / "judge.log", timeout_s=120, progress=silent) as judge:
        with pytest.raises(kind, match=message) as first:
            judge.score(items)
        (tmp_path / "judge.log").unlink()
        with pytest.raises(kind) as second:
            judge.compare([])
        assert second.value is first.value
        assert not (tmp_path / "judge.log").exists(), "a second process was started"


# ---- a judge that dies, hangs or babbles ---------------------------------

READY = Ready(pid=7, import_s=0.0, load_s=0.0, scorers=(Scorer("lpips", "scripted/1", "script"),), environment={})


@pytest.fixture
def scripted(tmp_path):
    """Starts a judge whose body is a few lines of Python; `say(bytes)` answers, `ask()` reads a request line."""
    judges = []

    def start(body: str, *, timeout_s: float = 30.0, cache: Path | None = None) -> Judge:
        script = tmp_path / "judge.py"
        script.write_text(
            "import os, signal, sys, time\n"
            "say = lambda data: (sys.stdout.buffer.write(data), sys.stdout.buffer.flush())\n"
            f"asked = open({str(tmp_path / 'asked.log')!r}, 'ab', buffering=0)\n"
            "def ask():\n    line = sys.stdin.buffer.readline(); asked.write(line); return line\n"
            + textwrap.dedent(body)
        )
        judge = Judge(
            ScorerChoice(),
            log=tmp_path / "judge.log",
            timeout_s=timeout_s,
            progress=silent,
            cache=cache,
            command=(sys.executable, str(script)),
        )
        judges.append(judge)
        return judge

    yield start
    for judge in judges:
        judge.end()
    assert not [child for child in psutil.Process().children() if str(tmp_path) in command_line(child)]


def command_line(process: psutil.Process) -> str:
    """Empty for one that is gone: another test's, not yet reaped."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def answer(items: list[Item]) -> bytes:
    return encode(
        Scored(
            tuple(ImageScore(item.prompt, item.seed, item.path, item.pixels_sha256, 0.3, 0, None, ()) for item in items)
        )
    )


OPENED = f"ask()\nsay({encode(READY)!r})\n"


def test_death_names_how_when_and_last_words(scripted, items):
    judge = scripted(OPENED + "ask()\nprint('out of luck', file=sys.stderr)\nsys.exit(4)")
    with pytest.raises(EngineError) as caught:
        judge.score(items)
    assert "quality judge: left with exit status 4 during scoring images" in caught.value.message
    assert "out of luck" in caught.value.message
    assert "judge.log" in caught.value.mend


def test_the_real_judge_killed_while_idle_is_an_error_and_the_next_one_works(tmp_path, items):
    with Judge(ScorerChoice(clip=""), log=tmp_path / "judge.log", timeout_s=120, progress=silent) as judge:
        first = judge.ready().pid
        before = judge.score(items)
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        with pytest.raises(EngineError, match="quality judge: was killed by SIGKILL during scoring images"):
            judge.score(items)
        assert judge.score(items) == before
        second = judge.ready().pid
        assert second != first
    assert not psutil.pid_exists(second)


def test_images_under_way_are_lost_with_the_judge_and_say_so(scripted, items):
    judge = scripted(OPENED + "ask()\nos.kill(os.getpid(), signal.SIGSEGV)")
    ticket = judge.submit(items)
    with pytest.raises(EngineError, match="was killed by SIGSEGV"):
        judge.collect(ticket)
    with pytest.raises(EngineError, match="was killed by SIGSEGV"):
        judge.collect(ticket)


def test_an_ended_judge_keeps_no_promise(scripted, items):
    judge = scripted(OPENED + "ask()\nsignal.pause()")
    ticket = judge.submit(items)
    judge.end()
    with pytest.raises(EngineError, match=r"ended before it scored these images"):
        judge.collect(ticket)


def test_silence_is_ended_and_said(scripted, items):
    judge = scripted(OPENED + "ask()\nsignal.pause()", timeout_s=0.6)
    with pytest.raises(EngineError, match=r"said nothing for 0.6 s during scoring images and was ended"):
        judge.score(items)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"hello\n", "answered something else than the protocol"),
        (encode(READY), "answered Ready where Scored was due"),
        (encode(Scored(())), "scored 0 of 3 images"),
        (b'{"type":"Scored","images":[{"clip_score":null}]}\n', "answered something else than the protocol"),
    ],
)
def test_nonsense_is_an_error(scripted, items, reply, message):
    judge = scripted(OPENED + f"ask()\nsay({reply!r})\nask()")
    with pytest.raises(EngineError, match=message):
        judge.score(items)


def test_nothing_is_left_when_the_test_process_is_killed(tmp_path):
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                f"""
                import signal
                from pathlib import Path
                from pytest_zimage.quality.client import Judge
                from pytest_zimage.quality.protocol import ScorerChoice
                choice = ScorerChoice(clip="", lpips="")
                judge = Judge(choice, log=Path({str(tmp_path / "log")!r}), timeout_s=60, progress=lambda *_: None)
                print(judge.ready().pid, flush=True)
                signal.pause()
                """
            ),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(30)
    deadline = time.monotonic() + 30
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the judge outlived the test process"


def test_the_test_process_imports_nothing_heavy():
    code = """
        import sys
        import pytest_zimage.quality.client, pytest_zimage.quality.controls
        heavy = {"torch", "numpy", "PIL", "open_clip", "lpips", "skimage", "safetensors"} & set(sys.modules)
        sys.exit(f"imported {heavy}" if heavy else 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- waiting, and not asking twice ---------------------------------------


def test_nothing_starts_before_it_is_needed(scripted, tmp_path):
    scripted(OPENED)
    assert not (tmp_path / "judge.log").exists()


def test_submitted_images_are_scored_while_other_things_happen(scripted, items):
    judge = scripted(OPENED + f"ask()\nsay({answer(items[:2])!r})\nask()\nsay({answer(items[2:])!r})\nask()")
    first = judge.submit(items[:2])
    second = judge.submit(items[2:])
    assert [score.seed for score in judge.collect(second)] == [3]
    assert [score.seed for score in judge.collect(first)] == [1, 2]


def test_an_error_of_submitted_images_reaches_only_who_collects_them(scripted, items):
    failure = b'{"type":"Failure","kind":"MeasurementError","message":"1.png: broken","mend":"draw it again"}\n'
    judge = scripted(OPENED + f"ask()\nsay({failure!r})\nask()\nsay({answer(items[2:])!r})\nask()")
    first = judge.submit(items[:2])
    assert len(judge.score(items[2:])) == 1
    with pytest.raises(MeasurementError, match=r"quality judge: 1.png: broken"):
        judge.collect(first)


def test_known_scores_are_shared_between_processes(scripted, items, tmp_path):
    cache = tmp_path / "cache"
    asked = tmp_path / "asked.log"
    body = OPENED + f"ask()\nsay({answer(items)!r})\nask()"
    scores = scripted(body, cache=cache).score(items)
    asked.unlink()
    again = scripted(body, cache=cache)
    renamed = [replace(item, prompt="other", path=f"/elsewhere/{item.seed}.png") for item in items]
    assert again.score(renamed) == tuple(replace(s, prompt="other", path=f"/elsewhere/{s.seed}.png") for s in scores)
    assert asked.read_bytes().count(b"ScoreImages") == 0


@pytest.mark.parametrize(
    "change",
    [
        {"text": "another text"},
        {"pixels_sha256": "1" * 64},
        {"reference_sha256": "2" * 64},
        {"size": (64, 64)},
        {"pixels_sha256": ""},
        {"reference_sha256": ""},
    ],
)
def test_other_images_are_not_taken_from_the_cache(scripted, items, tmp_path, change):
    body = OPENED + f"ask()\nsay({answer(items[:1])!r})\nask()"
    scripted(body, cache=tmp_path / "cache").score(items[:1])
    (tmp_path / "asked.log").unlink()
    scripted(body, cache=tmp_path / "cache").score([replace(items[0], **change)])
    assert (tmp_path / "asked.log").read_bytes().count(b"ScoreImages") == 1


def test_another_scorers_cache_and_a_broken_one_are_not_used(scripted, items, tmp_path):
    cache = tmp_path / "cache"
    body = OPENED + f"ask()\nsay({answer(items)!r})\nask()"
    scripted(body, cache=cache).score(items)
    other = replace(READY, scorers=(Scorer("lpips", "scripted/2", "script"),))
    (tmp_path / "asked.log").unlink()
    scripted(f"ask()\nsay({encode(other)!r})\nask()\nsay({answer(items)!r})\nask()", cache=cache).score(items)
    assert (tmp_path / "asked.log").read_bytes().count(b"ScoreImages") == 1
    for file in cache.iterdir():
        file.write_bytes(b"{")
    (tmp_path / "asked.log").unlink()
    scripted(body, cache=cache).score(items)
    assert (tmp_path / "asked.log").read_bytes().count(b"ScoreImages") == 1
