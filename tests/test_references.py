"""`Variant.reference`: images are held against those of the variant that it names, and of the same engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec import structs

from pytest_zimage.catalog import load_catalog
from pytest_zimage.engines.base import Engine
from pytest_zimage.engines.local import LocalEngine
from pytest_zimage.engines.protocol import DrawnImage, Injection
from pytest_zimage.errors import CatalogError
from pytest_zimage.images.desk import QualityDesk
from pytest_zimage.images.gallery import Gallery

SUITES = Path(__file__).parents[1] / "suites"
CATALOG = load_catalog()
TABLE = """
[variants.{name}]
title = "t"
transformer = "z_image_turbo_nvfp4.safetensors"
text_encoder = "qwen_3_4b.safetensors"
{keys}
"""
SMALL = """
[prompts.small]
title = "one prompt"

[[prompts.small.prompts]]
name = "lighthouse"
text = "a lighthouse at dawn"
seeds = [1, 2]
"""


def catalog(tmp_path, *tables):
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(tables), encoding="utf-8")
    return load_catalog([path])


# ---- the catalogue -----------------------------------------------------------


def test_a_catalogue_of_own_variants_needs_to_say_nothing(tmp_path):
    assert catalog(tmp_path, TABLE.format(name="mine", keys="")).variant("mine").reference == "bf16"


def test_an_own_variant_may_be_the_reference_and_the_twin_of_another(tmp_path):
    found = catalog(
        tmp_path,
        TABLE.format(name="mine", keys='reference = "mine"'),
        TABLE.format(name="mine-fast", keys='reference = "mine"\ntwin = "mine"'),
    )
    assert (found.variant("mine-fast").reference, found.variant("mine-fast").twin) == ("mine", "mine")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ('reference = "bf-16"', r"\[variants.mine\]: key 'reference': no variant 'bf-16'; did you mean 'bf16'"),
        ('reference = ""', r"\[variants.mine\]: key 'reference': no variant ''"),
        ('twin = "fp8-cats"', r"\[variants.mine\]: key 'twin': no variant 'fp8-cats'; did you mean 'fp8-cast'"),
        ('twin = "mine"', r"\[variants.mine\]: key 'twin': it cannot be its own"),
    ],
)
def test_a_name_that_no_variant_has_is_an_error(tmp_path, keys, says):
    with pytest.raises(CatalogError, match=says):
        catalog(tmp_path, TABLE.format(name="mine", keys=keys))


# ---- which images ------------------------------------------------------------


def drawn(name):
    prompts = CATALOG.prompt_set("vllm-3x1").prompts
    return tuple(DrawnImage(p.name, p.seeds[0], f"/{name}/{p.name}.png", f"{name}-{p.name}") for p in prompts)


@pytest.fixture
def session():
    """nvfp4 is held against fp8-cast; every variant has a run with images."""
    mine = structs.replace(CATALOG.variant("nvfp4"), reference="fp8-cast")
    found = structs.replace(CATALOG, variants={**CATALOG.variants, "nvfp4": mine})
    return SimpleNamespace(
        catalog=found,
        workload=CATALOG.workload("turbo-1024"),
        injection=Injection(),
        wants_images=True,
        variants=lambda: list(found.variants.values()),
        run=lambda variant, index: SimpleNamespace(images=drawn(variant.name)),
        book=SimpleNamespace(recorded=lambda name: [SimpleNamespace(images=drawn(name))]),
        settings=SimpleNamespace(prompts="vllm-3x1", update_baselines=False, work=Path("/nowhere")),
    )


@pytest.fixture
def desk(session):
    made = QualityDesk(session)
    made.gallery.shelf_of = lambda variant, clean=False: SimpleNamespace(keep=lambda images: None)
    return made


@pytest.mark.parametrize(("name", "reference"), [("nvfp4", "fp8-cast"), ("fp8-scaled", "bf16"), ("bf16", "bf16")])
def test_each_variant_is_held_against_its_own(desk, session, name, reference):
    variant = session.catalog.variant(name)
    assert desk.gallery.references(variant) == drawn(reference)
    assert desk.gallery.references_at_hand(variant) == drawn(reference)


def test_controls_are_scored_on_the_reference_and_once_for_each(desk, session):
    asked = []
    desk.__dict__["judge"] = SimpleNamespace(controls=lambda prompts: asked.append(prompts) or ())
    for name in ("nvfp4", "fp8-scaled", "bf16", "nvfp4"):
        desk.controls(session.catalog.variant(name))
    assert [prompts[0].paths for prompts in asked] == [("/fp8-cast/fisherman.png",), ("/bf16/fisherman.png",)]


@pytest.mark.parametrize(
    ("lasting", "folders"),
    [(True, ("a", "a", "b")), (False, ("a", "b", "c"))],
    ids=["in-process", "server"],
)
def test_images_of_another_engine_or_of_an_unknown_server_serve_no_other_session(session, tmp_path, lasting, folders):
    def shelf(engine, folder):
        there = SimpleNamespace(
            **{**vars(session), "engine": engine, "folder": Path(folder), "settings": session.settings}
        )
        there.settings.work = tmp_path
        plan = SimpleNamespace(
            variant=CATALOG.variant("bf16"), workload=session.workload, environment={}, inject=Injection()
        )
        return Gallery(there).shelf(plan).folder

    mine = SimpleNamespace(name="mine", images_last=lasting)
    other = SimpleNamespace(name="other", images_last=lasting)
    found = [shelf(mine, "monday"), shelf(mine, "tuesday"), shelf(other, "tuesday")]
    assert [sorted(set(found), key=found.index).index(path) for path in found] == ["abc".index(f) for f in folders]


def test_only_the_engine_in_this_process_tree_has_images_that_last():
    assert (Engine.images_last, LocalEngine.images_last) == (False, True)


# ---- the whole way -------------------------------------------------------------


def test_the_scores_are_those_against_the_named_reference(project, results):
    """A copy of nvfp4 whose reference is nvfp4 draws its very images; against bf16 they differ."""
    shutil.copy(SUITES / "test_quality.py", project.path / "test_suite.py")
    (project.path / "mine.toml").write_text(SMALL + TABLE.format(name="copy", keys='reference = "nvfp4"'))
    project.runpytest_subprocess(
        *("--zimage-config=copy,nvfp4", "--zimage-catalog=mine.toml", "--zimage-prompts=small"),
        *("--zimage-rounds=1", "-k", "pixels"),
    )
    values = {row["variant"]: row["value"] for row in results()["verdicts"] if row["metric"] == "psnr"}
    assert values["copy"] is None or values["copy"] >= 60
    assert 10 < values["nvfp4"] < 50
