"""`--zimage-vllm-omni-*`: which vLLM-Omni draws, told before anything is measured."""

from __future__ import annotations

import pytest
from refusing import refused
from standins.vllm_omni_running import StandIn

ENGINE = "--zimage-engine=vllm-omni"
URL = "--zimage-vllm-omni-url=http://127.0.0.1:8091"


@pytest.fixture
def command(tmp_path):
    return f"--zimage-vllm-omni-command={StandIn(tmp_path).command}"


@pytest.fixture
def ask(project):
    """Lists with these arguments, and these lines in the ini file; nothing is started for that."""

    def run(*arguments: str, ini: str = ""):
        with (project.path / "tox.ini").open("a") as file:
            file.write(f"\n{ini}\n")
        return project.runpytest_subprocess("--zimage-list", "--zimage-models=official", *arguments)

    return run


def listed(result) -> dict[str, str]:
    return {block.split()[0]: block for block in result.stdout.str().split("\n\n")[1:]}


def test_a_command_is_one_to_start(ask, command, project):
    result = ask(ENGINE, command, "--zimage-config=bf16,modelopt-attn-only-sage,nvfp4")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["engine    vllm-omni: starts */vllm serve for every run", "workload  turbo-1024x512:*"]
    )
    found = listed(result)
    assert "weights       Tongyi-MAI/Z-Image-Turbo: fetched by the server when it starts" in found["bf16"]
    assert "UNABLE: modelopt-attn-only-sage: no whole pipeline" in found["modelopt-attn-only-sage"]
    assert "UNABLE: nvfp4 names single files" in found["nvfp4"]
    assert "MISSING" not in result.stdout.str(), "the single files are not what it reads"


def test_a_pipeline_in_the_folder_is_found(ask, command, project):
    folder = project.path / "models" / "Z-Image-Turbo-FP8-attn-only"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    result = ask(ENGINE, command, "--zimage-config=modelopt-attn-only-sage", f"--zimage-models={folder.parent}")
    result.stdout.fnmatch_lines([f"    weights       {folder}: found: {folder}"])


def test_a_url_is_one_that_runs(ask):
    result = ask(ENGINE, URL, "--zimage-vllm-omni-pid=1", "--zimage-config=bf16")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["engine    vllm-omni: attaches to the one at http://127.0.0.1:8091", "*weights *the server has loaded"]
    )


def test_no_command_is_a_usage_error_that_names_both_options(ask):
    refused(
        ask(ENGINE, ini="zimage_vllm_omni_command = no-such-vllm"),
        "ERROR: the vllm-omni engine has no vLLM-Omni to draw with: no-such-vllm is no command here",
        "  mend: *--zimage-vllm-omni-command=FILE*--zimage-vllm-omni-url=URL",
    )


def test_both_ways_are_a_usage_error(ask, command):
    refused(ask(ENGINE, URL, command), "ERROR: --zimage-vllm-omni-command: for a server that is started here*")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([URL, "--zimage-vllm-omni-flags=--enforce-eager"], "ERROR: --zimage-vllm-omni-flags: for a server that is *"),
        (["--zimage-vllm-omni-pid=7"], "ERROR: --zimage-vllm-omni-pid 7: the process of a server that runs already*"),
        (["--zimage-vllm-omni-url=ftp://h"], "ERROR: --zimage-vllm-omni-url ftp://h: write http://host:port"),
    ],
)
def test_what_contradicts_itself_is_a_usage_error(ask, arguments, line):
    refused(ask(ENGINE, *arguments), line)


@pytest.mark.parametrize("option", ["command=vllm", "flags=--enforce-eager", "url=http://h:1", "pid=1"])
@pytest.mark.parametrize("engine", ["diffusers", "comfyui"])
def test_an_option_of_an_engine_that_does_not_draw_is_a_usage_error(ask, option, engine):
    refused(
        ask(f"--zimage-engine={engine}", f"--zimage-vllm-omni-{option}"),
        f"ERROR: --zimage-vllm-omni-* is for the engine vllm-omni, and this session draws with {engine}:"
        " add --zimage-engine=vllm-omni, or leave it out",
    )


def test_the_command_line_outranks_the_other_way_of_the_ini_file(ask, command):
    ini = f"zimage_vllm_omni_command = {command.partition('=')[2]}\nzimage_vllm_omni_flags = --enforce-eager"
    attached = ask(ENGINE, URL, ini=ini)
    attached.stdout.fnmatch_lines(["engine    vllm-omni: attaches to the one at http://127.0.0.1:8091"])


def test_the_command_line_has_one_started_where_the_ini_file_names_one_that_runs(ask, command):
    started = ask(ENGINE, command, ini="zimage_vllm_omni_url = http://127.0.0.1:8091")
    started.stdout.fnmatch_lines(["engine    vllm-omni: starts */vllm serve for every run"])


@pytest.mark.parametrize(
    ("config", "names"), [([], "13: bf16, *, ..."), (["--zimage-config=bf16,online-fp8"], "2: bf16, online-fp8")]
)
def test_one_that_runs_serves_one_variant(project, config, names):
    project.makepyfile("def test_warm_latency(zimage):\n    zimage.gate(zimage.warm_latency())\n")
    result = project.runpytest_subprocess(ENGINE, URL, "--zimage-models=official", *config)
    refused(
        result,
        f"ERROR: vLLM-Omni at http://127.0.0.1:8091 serves one variant, and this session is of {names}",
        "  mend: name the one that it serves: --zimage-config=NAME",
    )


def test_weights_of_one_that_runs_must_be_named(project):
    refused(
        project.runpytest_subprocess("--zimage-list", ENGINE, URL, "--zimage-config=bf16"),
        "ERROR: --zimage-vllm-omni-url names a server that runs already, and nothing says which weights it has: add *",
    )
