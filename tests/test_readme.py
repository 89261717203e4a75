"""What README.md and docs/ tell people to write and to type is what the project understands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints.building import build_transformer
from pytest_zimage.checkpoints.synthetic import set_dims
from pytest_zimage.options import readers
from pytest_zimage.options.table import OPTIONS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
TABLES = re.findall(r"^```toml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHIPPED = load_catalog()


@pytest.fixture
def catalog(tmp_path):
    """The shipped catalogue and every TOML table of the README, to the letter."""
    (tmp_path / "readme.toml").write_text("\n".join(TABLES), encoding="utf-8")
    return load_catalog([tmp_path / "readme.toml"])


def test_its_tables_are_a_catalogue(catalog):
    assert set(catalog.variants) - set(SHIPPED.variants) == {"my-mix", "bf16-cudnn-compile"}
    assert set(catalog.workloads) - set(SHIPPED.workloads) == {"portrait-768"}


@pytest.mark.usefixtures("attention_backend_kept")
def test_its_accelerated_variant_is_what_the_text_says(catalog):
    variant = catalog.variant("bf16-cudnn-compile")
    assert (variant.attention, variant.compile) == ("_native_cudnn", True)
    transformer = build_transformer(set_dims("synthetic-tiny", catalog), variant, torch.device("cpu"))
    backends = {getattr(module, "backend", None) for module in transformer.modules()} - {None}
    assert {backend.value for backend in backends} == {"_native_cudnn"}


def test_its_variants_can_be_listed(script):
    (script.project.path / "mine.toml").write_text("\n".join(TABLES), encoding="utf-8")
    result = script.run(
        "my-mix,bf16-cudnn-compile", "--zimage-list", "--zimage-catalog=mine.toml", "--zimage-workload=portrait-768"
    )
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["workload  portrait-768: 768x1024, 8 steps", "my-mix  my own mix*", "*lanes         h200, b200, rtx5090"]
    )


def test_it_names_every_lane_and_none_besides():
    (told,) = re.findall(r"^Lanes: (.*?)\. ", README, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", told)) == set(SHIPPED.devices)


def test_the_options_that_it_names_are_there():
    named = set(re.findall(r"--(?:zimage|update)-[a-z-]*[a-z]", TEXT)) - {"--zimage-list"}
    assert len(named) > 5
    assert named <= {option.option for option in OPTIONS}


@pytest.mark.parametrize(
    "text", sorted(set(re.findall(r"(?:warm_latency|cold_load|memory|quality|dispatch|fitness)=[^\s`,]+", TEXT)))
)
def test_the_faults_that_it_names_can_be_injected(text):
    assert readers.injection("--zimage-inject", text, ROOT)


def test_the_files_that_it_names_are_there():
    named = set(re.findall(r"\b(?:benchmarks|tests|suites|docs|baselines|tools)/[\w./-]+\.\w+", TEXT))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_somewhere(page):
    links = set(re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")))
    assert [link for link in sorted(links) if not (page.parent / link).exists()] == []


def test_every_page_is_reached_from_the_readme():
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name})" not in README] == []


def test_its_table_of_variants_is_what_runs_when_nothing_is_asked_for():
    told = re.findall(r"^\| `([\w-]+)` \|.* s \|$", README, re.MULTILINE)
    assert set(told) == {variant.name for variant in SHIPPED.variants.values() if variant.default}
