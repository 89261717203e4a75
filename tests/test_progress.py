"""Signs of life, with a scripted clock."""

from __future__ import annotations

import itertools

import pytest

from pytest_zimage.reports.progress import HEARTBEAT_S, Progress


class Terminal:
    """What a person would see: carriage returns overwrite, newlines scroll."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.writes: list[str] = []
        self.lines = [""]
        self.column = 0

    def __call__(self, text: str) -> None:
        self.writes.append(text)
        for character in text:
            if character == "\r":
                self.column = 0
            elif character == "\n":
                self.lines.append("")
                self.column = 0
            else:
                line = self.lines[-1].ljust(self.column)
                self.lines[-1] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1

    @property
    def seen(self) -> list[str]:
        return [line.rstrip() for line in self.lines]


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


def live(terminal: Terminal, width: int = 80) -> Progress:
    return Progress(terminal, True, lambda: terminal.now_s, width=lambda: width)


def piped(terminal: Terminal) -> Progress:
    return Progress(terminal, False, lambda: terminal.now_s)


def test_live_line_is_one_line_that_moves(terminal):
    progress = live(terminal)
    progress.update("nvfp4", 2, "drawing", 1, 10)
    assert terminal.seen == ["nvfp4, run 2: drawing 1/10, 0 s"]
    terminal.now_s += 5
    progress.update("nvfp4", 2, "drawing", 3, 10)
    assert terminal.seen == ["nvfp4, run 2: drawing 3/10, 5 s"]
    terminal.now_s += 7
    progress.tick()
    assert terminal.seen == ["nvfp4, run 2: drawing 3/10, 12 s"]


def test_shorter_line_leaves_nothing_of_the_longer_one(terminal):
    progress = live(terminal)
    progress.update("a-very-long-variant-name", 1, "reading the transformer")
    progress.update("bf16", 1, "load")
    assert terminal.seen == ["bf16, run 1: load, 0 s"]


def test_clear_leaves_an_empty_line_for_other_output(terminal):
    progress = live(terminal)
    progress.update("bf16", 1, "load")
    progress.clear()
    assert (terminal.seen, terminal.column) == ([""], 0)
    progress.clear()
    assert len(terminal.writes) == 2, "clearing nothing writes nothing"
    terminal.now_s += 1
    progress.tick()
    assert terminal.seen == ["bf16, run 1: load, 1 s"]


def test_narrow_terminal_never_wraps(terminal):
    live(terminal, width=12).update("nvfp4-fp8e", 1, "reading", 1, 2)
    assert terminal.seen == ["nvfp4-fp8e,"]
    assert len(terminal.lines[-1]) <= 11


def test_a_flood_of_updates_is_drawn_ten_times_a_second(terminal):
    progress = live(terminal)
    for done in range(1000):
        terminal.now_s += 0.001
        progress.update("bf16", 1, "read", done, 1000)
    assert 5 <= len(terminal.writes) <= 12


def test_change_of_stage_is_drawn_at_once_and_starts_its_own_clock(terminal):
    progress = live(terminal)
    progress.update("bf16", 1, "read")
    terminal.now_s += 0.01
    progress.update("bf16", 1, "build")
    assert terminal.seen == ["bf16, run 1: build, 0 s"]


def test_finish_ends_the_ticking(terminal):
    progress = live(terminal)
    progress.update("bf16", 1, "read")
    progress.finish()
    terminal.now_s += 100
    progress.tick()
    assert terminal.seen == [""]


def test_without_a_terminal_short_work_is_silent(terminal):
    progress = piped(terminal)
    progress.update("bf16", 1, "read")
    terminal.now_s += HEARTBEAT_S - 0.1
    progress.update("bf16", 1, "build")
    progress.finish()
    assert terminal.writes == []


def test_heartbeat_is_a_whole_line_at_most_every_thirty_seconds(terminal):
    progress = piped(terminal)
    progress.update("bf16", 1, "read", 1, 4)
    beats = []
    for _ in range(600):
        terminal.now_s += 0.5
        before = len(terminal.writes)
        progress.tick()
        beats += [terminal.now_s] * (len(terminal.writes) - before)
    assert len(beats) == 10
    assert all(later - earlier >= HEARTBEAT_S for earlier, later in itertools.pairwise(beats))
    assert terminal.writes[0] == "zimage: bf16, run 1: read 1/4, 30 s\n"
    assert not any("\r" in text for text in terminal.writes)


def test_heartbeat_keeps_its_rhythm_across_variants(terminal):
    progress = piped(terminal)
    for number in range(12):
        progress.update(f"variant{number}", 1, "read")
        terminal.now_s += 10
        progress.tick()
        progress.finish()
    assert len(terminal.writes) == 4


def test_tick_before_any_work_is_nothing(terminal):
    live(terminal).tick()
    piped(terminal).tick()
    assert terminal.writes == []
