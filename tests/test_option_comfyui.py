"""`--zimage-comfyui-*`: which ComfyUI draws, told before anything is measured."""

from __future__ import annotations

import pytest
from refusing import refused
from standins.comfyui_server import STANDIN

from pytest_zimage.engines.comfyui.engine import ComfyUIEngine
from pytest_zimage.errors import UnsupportedError

ENGINE = "--zimage-engine=comfyui"
DIR = f"--zimage-comfyui-dir={STANDIN}"
URL = "--zimage-comfyui-url=http://127.0.0.1:8188"


@pytest.fixture
def ask(project):
    """Lists with these arguments, and these lines in the ini file; nothing is started for that."""

    def run(*arguments: str, ini: str = ""):
        with (project.path / "tox.ini").open("a") as file:
            file.write(f"\n{ini}\n")
        named = "--zimage-models=synthetic-tiny"
        return project.runpytest_subprocess("--zimage-list", "--zimage-config=nvfp4,svdquant-w4a4", named, *arguments)

    return run


def test_a_folder_is_one_to_start_from(ask):
    result = ask(ENGINE, DIR)
    assert result.ret == 0
    result.stdout.fnmatch_lines([f"engine    comfyui: starts {STANDIN} with * for every run"])
    assert "transformer   z_image_turbo_nvfp4.safetensors: found" in result.stdout.str()
    assert "tokenizer" not in result.stdout.str(), "it brings its own"


def test_a_url_is_one_that_runs(ask):
    result = ask(ENGINE, URL, "--zimage-comfyui-pid=1")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "engine    comfyui: attaches to the one at http://127.0.0.1:8188",
            "    weights       z_image_turbo_nvfp4.safetensors, *, as the server itself has them",
        ]
    )
    assert "MISSING" not in result.stdout.str()


def test_a_variant_that_it_cannot_draw_is_told_before_it_is_asked_for(ask):
    result = ask(ENGINE, DIR, "--zimage-config=gguf-q4_k,online-fp8,nvfp4")
    assert result.ret == 0
    found = {block.split()[0]: block for block in result.stdout.str().split("\n\n")[1:]}
    assert "engine        UNABLE: gguf-q4_k: ComfyUI cannot draw it: " in found["gguf-q4_k"]
    assert "vLLM-Omni's" in found["online-fp8"]
    assert "UNABLE" not in found["nvfp4"]


def test_the_other_engine_of_a_comparison_is_told_too(ask):
    result = ask(DIR, "--zimage-parity=comfyui")
    result.stdout.fnmatch_lines(
        ["engine    diffusers: in a process of its own*", f"parity    comfyui: starts {STANDIN}*"]
    )


@pytest.mark.parametrize("list_only", [True, False])
def test_neither_is_a_usage_error_that_names_both_options(ask, project, list_only):
    result = ask(ENGINE) if list_only else project.runpytest_subprocess(ENGINE)
    refused(
        result,
        "ERROR: the comfyui engine has no ComfyUI to draw with",
        "  mend: *--zimage-comfyui-dir=DIR*--zimage-comfyui-url=URL",
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            [DIR, URL],
            "ERROR: --zimage-comfyui-dir: for a server that is started here, and --zimage-comfyui-url names *",
        ),
        ([URL, "--zimage-comfyui-flags=--fast"], "ERROR: --zimage-comfyui-flags: for a server that is started here*"),
        ([URL, "--zimage-comfyui-python=/usr/bin/python3"], "ERROR: --zimage-comfyui-python: for a server that is*"),
        ([DIR, "--zimage-comfyui-pid=7"], "ERROR: --zimage-comfyui-pid 7: the process of a server that runs already*"),
        (["--zimage-comfyui-pid=7"], "ERROR: --zimage-comfyui-pid 7: *nothing says where that one listens"),
        (["--zimage-comfyui-dir=/nowhere"], "ERROR: no ComfyUI in /nowhere: it has no main.py"),
        ([DIR, "--zimage-comfyui-python=/nowhere/python"], "ERROR: /nowhere/python: no such file to run ComfyUI with"),
        (["--zimage-comfyui-url=127.0.0.1:8188"], "ERROR: --zimage-comfyui-url 127.0.0.1:8188: write http://host:port"),
        (["--zimage-comfyui-url=http://me:pw@host"], "ERROR: --zimage-comfyui-url *: write http://host:port"),
        ([DIR, "--zimage-comfyui-flags='"], "ERROR: --zimage-comfyui-flags ': No closing quotation"),
    ],
)
def test_what_contradicts_itself_is_a_usage_error(ask, arguments, line):
    refused(ask(ENGINE, *arguments), line)


@pytest.mark.parametrize(
    "option", ["dir=/tmp", "python=/tmp", "flags=--fast", "url=http://h:1", "pid=1", "workflow=a.json"]
)
def test_an_option_of_an_engine_that_does_not_draw_is_a_usage_error(ask, option):
    name = option.partition("=")[0]
    refused(
        ask(f"--zimage-comfyui-{option}"),
        f"ERROR: --zimage-comfyui-{name} is for the engine comfyui, and this session draws with diffusers:"
        " add --zimage-engine=comfyui, or leave it out",
    )


def test_the_ini_file_may_keep_them_for_the_sessions_that_need_them(ask):
    ini = f"zimage_comfyui_dir = {STANDIN}\nzimage_comfyui_flags = --lowvram"
    assert ask(ini=ini).ret == 0
    ask(ENGINE).stdout.fnmatch_lines([f"engine    comfyui: starts {STANDIN}*"])


def test_the_command_line_outranks_the_other_way_of_the_ini_file(ask):
    attached = ask(ENGINE, URL, ini=f"zimage_comfyui_dir = {STANDIN}\nzimage_comfyui_flags = --lowvram")
    attached.stdout.fnmatch_lines(["engine    comfyui: attaches to the one at http://127.0.0.1:8188"])


def test_the_command_line_has_one_started_where_the_ini_file_names_one_that_runs(ask):
    started = ask(ENGINE, DIR, ini="zimage_comfyui_url = http://127.0.0.1:8188\nzimage_comfyui_pid = 7")
    started.stdout.fnmatch_lines([f"engine    comfyui: starts {STANDIN}*"])


def test_both_in_the_ini_file_contradict_each_other(ask):
    result = ask(ENGINE, ini=f"zimage_comfyui_dir = {STANDIN}\nzimage_comfyui_url = http://127.0.0.1:8188")
    refused(result, "ERROR: --zimage-comfyui-dir: for a server that is started here*")


@pytest.mark.parametrize("ini", ["", "zimage_comfyui_url = http://127.0.0.1:8188"])
def test_weights_of_one_that_runs_must_be_named(project, ini):
    """Else they would be taken for the tiny ones, whatever they are."""
    with (project.path / "tox.ini").open("a") as file:
        file.write(f"\n{ini}\n")
    asked = [ENGINE, "--zimage-config=bf16", *([] if ini else [URL])]
    for more in ([], ["--zimage-list"]):
        refused(
            project.runpytest_subprocess(*asked, *more),
            "ERROR: --zimage-comfyui-url names a server that runs already, and nothing says which weights it has: add"
            " --zimage-models=official, or --zimage-models=DIR where the folder that it reads is on this host",
        )
    assert project.runpytest_subprocess(*asked, "--zimage-list", "--zimage-models=official").ret == 0
    assert project.runpytest_subprocess("--zimage-list", "--zimage-config=bf16").ret == 0, "another engine draws"


def test_an_engine_of_ones_own_may_build_on_them(project):
    project.makeconftest(
        """
        def pytest_zimage_engines(config):
            from pytest_zimage.engines.comfyui.engine import ComfyUIEngine
            from pytest_zimage.session import start

            return {"mine": lambda: ComfyUIEngine(start(config).settings)}
        """
    )
    result = project.runpytest_subprocess("--zimage-list", "--zimage-engine=mine", DIR)
    result.stdout.fnmatch_lines([f"engine    mine: starts {STANDIN}*"])


def test_a_command_to_run_next_repeats_them_so_that_pytest_reads_them(project):
    from pytest_zimage.options import repeated_options

    config = project.parseconfig(ENGINE, DIR, "--zimage-comfyui-flags=--fast --lowvram")
    assert repeated_options(config) == [ENGINE, DIR, "--zimage-comfyui-flags=--fast --lowvram"]


def test_collecting_imports_nothing_that_talks_to_a_server(project):
    project.makeconftest(
        """
        def pytest_unconfigure(config):
            import sys
            print("LOADED", *(n for n in ("numpy", "torch", "httpx", "httpcore", "websockets") if n in sys.modules))
        """
    )
    result = project.runpytest_subprocess("--collect-only", "-q", "-p", "no:anyio", ENGINE, DIR)
    assert result.ret == 0
    assert [line for line in result.outlines if line.startswith("LOADED")] == ["LOADED"]


def test_a_variant_that_cannot_be_drawn_waits_for_no_machine(tmp_path, monkeypatch):
    """The wait until the machine is fit may be long; what is refused anyway is refused first."""
    from standins.comfyui_plan import make_plan, make_settings, silent, variant

    from pytest_zimage.engines.servers import engine as engine_module

    monkeypatch.setattr(engine_module, "guarding", lambda *_, **__: pytest.fail("waited"))
    engine = ComfyUIEngine(make_settings(tmp_path, comfyui_dir=STANDIN))
    plan = make_plan(None, tmp_path, variant("gguf-q4_k"))
    with pytest.raises(UnsupportedError, match="is GGUF"):
        engine.run(plan, silent)
