"""Each way in which a ComfyUI server can let a prompt down is an error that says what happened and what to do."""

from __future__ import annotations

import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
from standins.comfyui_plan import make_files, silent, workload
from standins.comfyui_server import ComfyUI, standin

from pytest_zimage.engines.comfyui import session as session_module
from pytest_zimage.engines.comfyui import stream as stream_module
from pytest_zimage.engines.comfyui.stream import EventStream, StreamLost
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.http import StatusError
from pytest_zimage.errors import EngineError, MeasurementError, MemoryShortageError, UnsupportedError

PNG_2X2 = "89504e470d0a1a0a0000000d4948445200000002000000020802000000fdd49a73"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    with standin(make_files(folder / "models", "bf16"), folder) as running:
        yield running


@pytest.fixture
def server(shared: ComfyUI):
    yield shared
    shared.faults()
    assert shared.get("/queue") == {"queue_running": [], "queue_pending": []}, "a prompt was left in the queue"


@pytest.fixture
def dying(tmp_path):
    with standin(make_files(tmp_path / "models", "bf16"), tmp_path) as running:
        yield running


def failing(server: ComfyUI, kind: type[Exception], fault: object, expected="warm", **changed):
    """The error of one image of a warm server with `fault`."""
    with server.warm(**{"timeout_s": 30.0, **changed}) as session:
        server.faults(at={"0": fault})
        with pytest.raises(kind) as caught:
            session.draw(workload(seed=5), expected)
        assert type(caught.value) is kind
        assert server.counts(), "the fault did not happen"
        # What went wrong once is over: the session goes on.
        session.draw(workload(seed=6), "any")
    return caught.value


def events(start: int = 1000, end: int = 2000, nodes=("1", "2", "3", "4", "5", "6", "7")):
    return [
        ["execution_start", {"timestamp": start}],
        ["execution_cached", {"nodes": list(nodes), "timestamp": start}],
        ["execution_success", {"timestamp": end}],
    ]


# ---- served from the cache ----------------------------------------------------------


def test_a_prompt_served_from_the_cache_is_no_sample(server):
    error = failing(server, MeasurementError, "cached")
    assert "node 8 (KSampler) did not run: its result came from the cache" in error.message
    error = failing(server, EngineError, "cached", "any")
    assert "instead of the one image that was asked for it names" in error.message
    assert "_00001_.png' in 'pytest-zimage' (output), not a file" in error.message


def test_a_cached_sampler_is_no_sample_even_where_the_image_is_new(server):
    cached = {"fault": "says cached", "history": {"status": {"messages": events(nodes=["1", "2", "3", "5", "8"])}}}
    error = failing(server, MeasurementError, cached)
    assert "node 8 (KSampler) did not run: its result came from the cache" in error.message


def test_a_warm_image_that_loaded_again_is_no_sample(server):
    error = failing(server, MeasurementError, "loads_again")
    assert "node 1 (UNETLoader), node 2 (CLIPLoader), node 3 (VAELoader) loaded its weights again" in error.message
    assert "--cache-none" in error.mend


def test_warm_images_that_differ_in_what_the_cache_serves_are_no_samples(server):
    with server.warm() as session:
        session.draw(workload(seed=5), "warm")
        with pytest.raises(MeasurementError, match=r"warm images differ in whether the cache served node 5 \(CLIPText"):
            session.draw(workload(seed=6, prompt="another"), "warm")


# ---- refused -------------------------------------------------------------------------


def refused(kind: str, node: str = "", status: int = 400, **info):
    """A 400 with an error of the type `kind`, or with one of the type `node` at the node 1."""
    problem = {"type": node, "message": "said so", "details": info.pop("details", "some details"), "extra_info": info}
    nodes = {"1": {"errors": [problem], "dependent_outputs": ["10"], "class_type": "UNETLoader"}} if node else {}
    error = {"type": kind, "message": "Said at large", "details": "the rest", "extra_info": {}}
    return {"fault": "refused", "status": status, "answer": {"error": error, "node_errors": nodes}}


@pytest.mark.parametrize(
    ("kind", "says", "mend"),
    [
        ("no_prompt", "it found no prompt in the request", "between here and the server"),
        ("invalid_prompt", "it cannot read the workflow", "--zimage-comfyui-workflow"),
        ("missing_node_type", "it lacks a node that the workflow has", "install the custom node"),
        ("prompt_no_outputs", "the workflow has no node that writes an image", "SaveImage"),
        ("prompt_outputs_failed_validation", "its nodes do not pass the checks", "the nodes above"),
        ("invalid_prompt_id", "it does not take the prompt's id", "update"),
        ("quota_exceeded", "quota_exceeded: Said at large", ""),
    ],
)
def test_a_refused_prompt_says_why(server, kind, says, mend):
    error = failing(server, EngineError, refused(kind))
    assert f"refuses the workflow: {says}" in error.message
    assert "\n    Said at large the rest" in error.message
    assert mend in error.mend


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ("value_not_in_list", "the server does not know this value (some details)"),
        ("invalid_input_type", "is of another type than the node takes (some details)"),
        ("required_input_missing", "is required, and missing (some details)"),
        ("return_type_mismatch", "is linked to an output of another type (some details)"),
        ("bad_linked_input", "is linked to nothing that exists (some details)"),
        ("dependency_cycle", "the links run in a circle (some details)"),
        ("custom_validation_failed", "the node itself refuses it (some details)"),
        ("exception_during_validation", "the server's check of it failed (some details)"),
        ("exception_during_inner_validation", "the server's check of what it is linked to failed (some details)"),
        ("value_smaller_than_min", "is too small (some details)"),
        ("value_bigger_than_max", "is too large (some details)"),
        ("brand_new", "brand_new: said so (some details)"),
    ],
)
def test_a_refused_node_says_why(server, node, says):
    error = failing(server, EngineError, refused("prompt_outputs_failed_validation", node, input_name="steps"))
    assert f"\n    node 1 (UNETLoader): input 'steps': {says}" in error.message


def test_an_id_of_another_form_is_refused_with_the_reason(server, monkeypatch):
    """Why prompts are sent with a UUID in small letters."""
    with server.warm() as session:
        monkeypatch.setattr(session_module.uuid, "uuid4", lambda: "1A0E6A10-0000-4000-8000-000000000000")
        with pytest.raises(EngineError, match="it does not take the prompt's id"):
            session.draw(workload(seed=5), "warm")


def test_errors_of_nodes_beside_a_prompt_that_was_taken_are_errors(server):
    nodes = refused("", "value_not_in_list", input_name="vae_name")["answer"]["node_errors"]
    error = failing(server, EngineError, {"fault": "node_errors", "node_errors": nodes})
    assert "took the workflow, and leaves out outputs whose nodes do not pass its checks" in error.message
    assert "node 1 (UNETLoader): input 'vae_name': the server does not know this value" in error.message


def test_a_refusal_in_another_form_is_shown_as_it_is(server):
    error = failing(server, StatusError, {**refused("x"), "answer": "no"})
    assert "POST /prompt: status 400: '\"no\"'" in error.message


# ---- failed, interrupted, deleted -----------------------------------------------------


def test_a_node_that_fails_is_named_with_its_words_and_the_logs(server):
    error = failing(server, EngineError, "error")
    assert "node 8 (KSampler) failed: RuntimeError: mat1 and mat2 shapes cannot be multiplied" in error.message
    assert '    File "sampling.py", line 7, in sample' in error.message
    assert "last lines of its log:\n" in error.message
    assert "\x1b" not in error.message


def test_too_little_memory_is_told_as_that(server):
    error = failing(server, MemoryShortageError, "out_of_memory")
    assert "ran out of memory in node 8 (KSampler): torch.OutOfMemoryError: Allocation on device" in error.message


def test_an_interrupted_prompt_is_an_error(server):
    error = failing(server, EngineError, "interrupted")
    assert "the prompt was interrupted at node 8 (KSampler)" in error.message


def test_a_deleted_prompt_is_noticed_long_before_the_limit(server):
    began = time.monotonic()
    error = failing(server, EngineError, "deleted", timeout_s=600.0)
    assert "is neither in its queue nor in its history: it was deleted" in error.message
    assert "leave the server's queue alone" in error.mend
    assert time.monotonic() - began < 300


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("deleted", EngineError, "is neither in its queue nor in its history: it was deleted"),
        ("stuck", RequestFault, "nothing was heard of prompt"),
    ],
)
def test_what_others_are_told_all_the_time_is_no_sign_of_a_prompt(server, fault, kind, says):
    """A custom node may tell every client its figures twice a second, whatever becomes of a prompt."""
    shown = []
    plan = server.plan(timeout_s=1.0 if fault == "stuck" else 600.0)
    with server.engine().open(plan, lambda *told: shown.append(told)) as session:
        session.draw(workload(), "any")
        server.faults(at={"0": fault}, monitor_s=0.01)
        shown.clear()
        with pytest.raises(kind) as caught:
            session.draw(workload(seed=5), "warm")
        assert says in caught.value.message
        assert ("drawing", 0, 0) in shown, "it shows that it is alive"
        session.draw(workload(seed=6), "warm")


def test_messages_without_a_pause_are_not_read_for_ever(monkeypatch):
    monkeypatch.setattr(stream_module, "_DRAINED_S", 0.05)
    for endless in (b"a preview", "custom: not JSON"):
        with EventStream("http://127.0.0.1:9", "me", 1.0) as stream:
            stream._connection = SimpleNamespace(recv=lambda timeout, endless=endless: endless)
            assert stream.receive(0.05) is None
            with pytest.raises(StreamLost, match="without a pause"):
                stream.drain()


def test_a_history_that_stays_empty_is_an_error(server):
    error = failing(server, EngineError, "no_history", timeout_s=1.0)
    assert "is over, and has nothing of it in its history" in error.message


@pytest.mark.parametrize(
    ("history", "kind", "says"),
    [
        ({"status": {"status_str": "error", "completed": False}}, EngineError, "ended without success: error"),
        ({"status": None}, EngineError, "ended without success: no status"),
        (
            {"status": {"messages": [["execution_success", {"timestamp": 5}]]}},
            EngineError,
            "the time of execution_start",
        ),
        (
            {"status": {"messages": [["execution_start", {"timestamp": "x"}]]}},
            EngineError,
            "messages that cannot be read",
        ),
        ({"outputs": []}, EngineError, "GET /history/.*: the answer is not what it should be"),
        ({"prompt": "x"}, EngineError, "GET /history/.*: the answer is not what it should be"),
    ],
)
def test_a_history_that_says_something_else_is_an_error(server, history, kind, says):
    error = failing(server, kind, {"fault": "history", "history": history})
    assert re.search(says, error.message)


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (0, "its clock went back by 1000 ms while it drew"),
        (9_000_000, "says that an image took 8999 s, which came within"),
    ],
)
def test_a_clock_that_jumps_is_no_measurement(server, end, says):
    script = {"fault": "clock", "history": {"status": {"messages": events(end=end)}}}
    error = failing(server, MeasurementError, script)
    assert says in error.message


# ---- what it names and what it sends ----------------------------------------------------


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        ({"filename": "../../etc/passwd"}, "'../../etc/passwd'"),
        ({"filename": "/etc/passwd"}, "'/etc/passwd'"),
        ({"filename": "a\\b.png"}, "'a\\\\b.png'"),
        ({"filename": ""}, "''"),
        ({"filename": "ComfyUI_00001_.png"}, "'ComfyUI_00001_.png'"),
        ({"subfolder": "../secret"}, "'../secret'"),
        ({"subfolder": "/tmp"}, "'/tmp'"),
        ({"type": "input"}, "(input)"),
        ({"filename": 7}, "cannot be read: Expected `str`, got `int`"),
        ({"filename": None}, "cannot be read: Expected `str`, got `null`"),
    ],
)
def test_a_reply_is_never_taken_for_a_path(server, image, shown):
    named = {"filename": "PREFIX_00001_.png", "subfolder": "pytest-zimage", "type": "output", **image}
    error = failing(server, EngineError, {"fault": "named", "history": {"outputs": {"10": {"images": [named]}}}})
    assert "instead of the one image that was asked for it names" in error.message
    assert shown in error.message


@pytest.mark.parametrize("id", ["../queue", "a?b#c", "ü", "a b\r\nX: y", "%2e%2e", "", "x" * 10_000])
def test_an_id_of_the_servers_own_is_never_taken_for_a_path(server, id):
    own = {"fault": "own id", "status": 200, "answer": {"prompt_id": id, "number": 0, "node_errors": {}}}
    error = failing(server, EngineError, own)
    assert f"gives the prompt an id that is none: {id[:80]!r}" in error.message


@pytest.mark.parametrize(
    ("output", "shown"),
    [({"images": []}, "0 images"), ({}, "0 images"), (None, "cannot be read"), ({"images": 3}, "cannot be read")],
)
def test_a_prompt_without_an_image_is_an_error(server, output, shown):
    # A table in the script is merged with what is there; a list around it takes its place.
    script = {"fault": "nothing", "outputs": {"10": output}}
    error = failing(server, EngineError, script)
    assert "instead of the one image" in error.message
    assert shown in error.message


def test_an_image_that_is_gone_is_an_error(server):
    error = failing(server, EngineError, {"fault": "gone", "view": "", "view_status": 404})
    assert "has no such image: status 404" in error.message


def test_an_image_without_end_is_not_read_to_the_end(server):
    error = failing(server, EngineError, {"fault": "endless", "view": PNG_2X2, "times": 600_000})
    assert "the answer is longer than" in error.message


@pytest.mark.parametrize(
    ("view", "says"),
    [(PNG_2X2, "2x2 where 128x128 was asked for"), ("ffd8ffe000104a464946", "not a PNG"), ("", "not a PNG")],
)
def test_an_image_that_is_another_or_none_at_all_ends_the_run(server, view, says):
    server.faults(at={"2": {"fault": "sent", "view": view}})
    with pytest.raises(MeasurementError, match=says):
        server.engine().run(server.plan(rounds=3), silent)


@pytest.mark.parametrize("number", [0, 1, 2, 4], ids=["cold", "warm-up", "first round", "last round"])
def test_a_black_image_is_no_sample_wherever_it_comes(dying, number):
    """Of values that are no numbers a process says so once in its life, and here it has said it before."""
    black = {"fault": "black"}
    with dying.warm() as session:
        dying.faults(at={"0": black})
        session.draw(workload(seed=5), "warm")
    dying.faults(at={str(number): black})
    with pytest.raises(MeasurementError, match=r"from seed \d+ gave a picture of one colour, \(0, 0, 0\)") as caught:
        dying.engine().run(dying.plan(rounds=3), silent)
    assert dying.counts() == {"black": 1}
    assert dying.get("/internal/logs").count("invalid value encountered in cast") == 1
    assert "look at the server's log" in caught.value.mend


def test_values_that_are_no_numbers_are_an_error_by_the_log_alone(dying):
    """Where some of them are numbers, the picture is no black one."""
    dying.faults(at={"3": {"fault": "says", "warns": "RuntimeWarning: invalid value encountered in cast"}})
    with pytest.raises(MeasurementError, match="it computed values that are no numbers"):
        dying.engine().run(dying.plan(rounds=3), silent)


# ---- the connection ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("drop_post", "dropped connection"),
        ("drop_answer", "dropped connection"),
        ("500_post", "status 500"),
        ("hang_post", "timeout"),
        ("stuck", "timeout"),
        ("drop_websocket", "dropped websocket"),
    ],
)
def test_an_accident_is_a_fault_to_try_again_and_leaves_nothing_behind(server, fault, kind):
    limit_s = 1.0 if kind == "timeout" else 30.0
    assert failing(server, RequestFault, fault, timeout_s=limit_s).kind == kind


@pytest.mark.parametrize(
    ("fault", "kind"), [("drop_view", "dropped connection"), ("500_history", "status 500"), ("hang_view", "timeout")]
)
def test_what_only_asks_is_asked_again_and_counted(server, fault, kind):
    with server.warm(timeout_s=1.0 if kind == "timeout" else 30.0) as session:
        server.faults(at={"0": fault})
        session.draw(workload(seed=5), "warm")
        assert server.counts() == {fault: 1}
        assert session.faults == {kind: 1}


def test_without_its_websocket_the_history_tells_of_an_image_whose_nodes_nobody_times(server):
    with server.warm() as session:
        server.faults(at={"0": "drop_websocket"})
        served = session.draw(workload(seed=5), "any")
        assert served.phases_s == {}
        assert served.seconds > 0
        assert session.faults == {"dropped websocket": 1}
        assert set(session.draw(workload(seed=6), "warm").phases_s) == {"sampler", "vae_decode", "save_image"}


def test_a_server_that_serves_no_websocket_is_measured_by_its_history(server):
    server.faults(no_websocket=True)
    record = server.engine().run(server.plan(), silent)
    assert [one.phases_s for one in record.rounds] == [{}] * 3
    assert all(one.seconds > 0 and "png" not in one.beside_s for one in record.rounds)
    assert any("no times of single nodes" in note for note in record.memory.notes)
    assert record.faults == {}


def test_a_server_that_does_not_let_go_of_a_prompt_hangs(dying):
    with dying.warm(timeout_s=1.0) as session:
        dying.faults(at={"0": "stuck_hard"})
        with pytest.raises(EngineError, match=r"hangs: prompt \S+ runs on 1 s after it was interrupted") as caught:
            session.draw(workload(seed=5), "warm")
    assert not isinstance(caught.value, RequestFault)
    assert "last lines of its log" in caught.value.message


def test_a_server_that_answers_nothing_any_more_hangs(dying):
    with dying.warm(timeout_s=0.5) as session:
        dying.faults(at={"0": "stop"})
        try:
            with pytest.raises(EngineError, match=r"hangs: .*GET /queue: no whole answer within 0\.5 s") as caught:
                session.draw(workload(seed=5), "warm")
        finally:
            os.kill(dying.process.pid, signal.SIGCONT)
    assert not isinstance(caught.value, RequestFault)


@pytest.mark.parametrize("fault", ["die", "killed"])
def test_an_attached_server_that_dies_is_an_error(dying, fault):
    with dying.warm() as session:
        dying.faults(at={"0": fault})
        with pytest.raises(EngineError, match=r"hangs: .*the connection was dropped") as caught:
            session.draw(workload(seed=5), "warm")
    assert not isinstance(caught.value, RequestFault)


def test_faults_without_end_end_the_run_with_their_counts(server):
    server.faults(every="500_post")
    with pytest.raises(EngineError, match=r"requests in a row failed \(status 500 4\)"):
        server.engine().run(server.plan(), silent)


def test_an_unsupported_variant_is_refused_before_anything_is_asked(server):
    with pytest.raises(UnsupportedError, match="modelopt-full: ComfyUI cannot draw it: transformer = "):
        server.engine().run(server.plan("modelopt-full"), silent)
