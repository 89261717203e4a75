"""Images are scored while a GPU draws the next ones, against the right references, and never at the cost of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pytest_zimage.catalog import load_catalog
from pytest_zimage.engines.protocol import DrawnImage, Injection
from pytest_zimage.errors import EngineError
from pytest_zimage.images.desk import QualityDesk

CATALOG = load_catalog()


class Judge:
    def __init__(self, error: Exception | None = None) -> None:
        self.handed: list[tuple] = []
        self.starts = 0
        self._error = error

    def start(self):
        self.starts += 1

    def submit(self, items):
        self.handed.append(items)
        if self._error is not None:
            raise self._error


def drawn(variant: str, prompts, seed: int = 42) -> list[DrawnImage]:
    return [DrawnImage(p.name, seed, f"/{variant}/{p.name}-{seed}.png", f"{variant}-{p.name}-{seed}") for p in prompts]


@pytest.fixture
def desk():
    def make(device: str = "cuda:0", references=(), judge=None, fault: str = ""):
        book = SimpleNamespace(recorded=lambda name: [SimpleNamespace(images=tuple(references))] if references else [])
        session = SimpleNamespace(
            catalog=CATALOG,
            workload=CATALOG.workload("turbo-1024"),
            machine=SimpleNamespace(torch_device=device),
            injection=Injection(quality=fault),
            book=book,
            settings=SimpleNamespace(prompts=next(iter(CATALOG.prompts))),
        )
        made = QualityDesk(session)
        made.__dict__["judge"] = judge or Judge()
        made.gallery.shelf_of = lambda variant, clean=False: SimpleNamespace(find=lambda pairs: None)
        return made

    return make


def test_each_image_meets_the_reference_of_its_prompt_and_seed(desk):
    made = desk()
    prompts = made.gallery.prompts.prompts
    references = drawn("bf16", reversed(prompts))
    made = desk(references=references)
    hand_in = made.scoring_meanwhile(CATALOG.variant("nvfp4"))
    for image in drawn("nvfp4", prompts):
        hand_in(image)
    (four,) = made.judge.handed
    assert [item.path for item in four] == [f"/nvfp4/{p.name}-42.png" for p in prompts[:4]]
    assert [item.reference_sha256 for item in four] == [f"bf16-{p.name}-42" for p in prompts[:4]]
    assert [item.text for item in four] == [p.text for p in prompts[:4]]


def test_bf16_is_its_own_reference(desk):
    made = desk()
    hand_in = made.scoring_meanwhile(CATALOG.variant("bf16"))
    for image in drawn("bf16", made.gallery.prompts.prompts):
        hand_in(image)
    assert all(item.reference == item.path for item in made.judge.handed[0])


@pytest.mark.parametrize("why", ["the CPU draws", "no reference is drawn yet", "bf16 would have to be drawn clean"])
def test_nothing_is_handed_in_where_it_would_cost(desk, why):
    made = desk()
    references = drawn("bf16", made.gallery.prompts.prompts)
    made = {
        "the CPU draws": lambda: desk(device="cpu", references=references),
        "no reference is drawn yet": desk,
        "bf16 would have to be drawn clean": lambda: desk(references=references, fault="black"),
    }[why]()
    hand_in = made.scoring_meanwhile(CATALOG.variant("nvfp4"))
    for image in drawn("nvfp4", made.gallery.prompts.prompts):
        hand_in(image)
    assert made.judge.handed == []
    assert (made.judge.starts > 0) == (why != "the CPU draws")


def test_those_drawn_before_the_reference_was_are_handed_in_once_it_is(desk):
    """Two GPUs begin with a variant each: the first images of the second are drawn before bf16's are."""
    made = desk()
    prompts = made.gallery.prompts.prompts
    references: list[DrawnImage] = []
    made._session.book.recorded = lambda name: [SimpleNamespace(images=tuple(references))] if references else []
    hand_in = made.scoring_meanwhile(CATALOG.variant("nvfp4"))
    images = [*drawn("nvfp4", prompts), *drawn("nvfp4", prompts, seed=7777)][:8]
    for image in images[:7]:
        hand_in(image)
    assert made.judge.handed == []
    references += [*drawn("bf16", prompts), *drawn("bf16", prompts, seed=7777)]
    hand_in(images[7])
    (eight,) = made.judge.handed
    assert [item.path for item in eight] == [image.path for image in images]


def test_an_image_without_a_reference_waits_for_the_others(desk):
    made = desk()
    made = desk(references=drawn("bf16", made.gallery.prompts.prompts[1:]))
    hand_in = made.scoring_meanwhile(CATALOG.variant("nvfp4"))
    for image in drawn("nvfp4", made.gallery.prompts.prompts[:5]):
        hand_in(image)
    (three,) = made.judge.handed
    assert [item.prompt for item in three] == [prompt.name for prompt in made.gallery.prompts.prompts[1:4]]


def test_a_judge_that_fails_does_not_stop_the_drawing(desk):
    made = desk()
    judge = Judge(EngineError("the judge died"))
    made = desk(references=drawn("bf16", made.gallery.prompts.prompts), judge=judge)
    hand_in = made.scoring_meanwhile(CATALOG.variant("nvfp4"))
    for image in drawn("nvfp4", made.gallery.prompts.prompts):
        hand_in(image)
    assert len(judge.handed) == 1
