"""What judges, stores, reports and tests knows no engine by its name: whatever draws is judged by the same code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pytest_zimage"
NAMES = re.compile(r"comfy_?ui|vllm|diffusers", re.IGNORECASE)
FOLDERS = ("verdict", "baselines", "judging", "reports", "images")
"""Not `options`: an engine's own options, their names, and who may give them."""
PACKAGES = {"images/shelf.py"}
"""Versions of packages, one of which is called as an engine is."""


def is_of_a_named_engine(path: Path) -> bool:
    """Whether it turns a table that somebody published of one engine into baselines."""
    return path.parent.name == "baselines" and path.stem.startswith("published")


MODULES = [
    path
    for path in (
        *(path for folder in FOLDERS for path in sorted((PACKAGE / folder).glob("*.py"))),
        *sorted(PACKAGE.glob("*.py")),
        *sorted((ROOT / "suites").glob("*.py")),
    )
    if not is_of_a_named_engine(path) and path.relative_to(PACKAGE.parent).as_posix().partition("/")[2] not in PACKAGES
]


def named(source: str) -> Iterator[str]:
    """`LINE: TEXT` of what names an engine: texts, names and imports; not what is only written for a reader."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str() as text) if id(node) not in prose:
                said = [text]
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.arg(arg=text) | ast.keyword(arg=str() as text):
                said = [text]
            case ast.FunctionDef(name=text) | ast.ClassDef(name=text):
                said = [text]
            case ast.ImportFrom(module=str() as text):
                said = [text, *(alias.name for alias in node.names)]
            case ast.Import():
                said = [alias.name for alias in node.names]
            case _:
                said = []
        yield from (f"{node.lineno}: {text}" for text in said if NAMES.search(text))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_names_no_engine(path):
    assert list(named(path.read_text(encoding="utf-8"))) == []


def test_all_of_them_are_looked_at():
    looked = {path.relative_to(ROOT).as_posix() for path in MODULES}
    assert {"suites/test_memory.py", "pytest_zimage/judging/gate.py", "pytest_zimage/verdict/metrics.py"} <= looked
    assert "pytest_zimage/baselines/store.py" in looked


@pytest.mark.parametrize(
    "source",
    [
        'if record.engine == "comfyui": pass',
        'key = f"vllm-omni.{name}"',
        "from pytest_zimage.engines.comfyui.log import facts",
        "from pytest_zimage.engines import vllm_omni",
        "settings.comfyui_url",
        "isinstance(engine, ComfyUIEngine)",
        "import diffusers",
        "draw(vllm=True)",
        'engines = {"diffusers": 1}',
    ],
)
def test_each_way_to_name_one_is_seen(source):
    assert list(named(source)) != []


def test_what_is_written_for_a_reader_may_name_one():
    assert list(named('"""As ComfyUI has it."""\nx = 1\n"""vLLM-Omni\'s."""\n# diffusers\n')) == []
