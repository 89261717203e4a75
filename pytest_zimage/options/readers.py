"""How the text of an option is read: each reader gets the option's name for its message, the text, and a folder.

The folder is where a relative path starts: the one the command was given in, or that of the ini file. Every reader
raises `pytest.UsageError` for text that cannot be used.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest

_AMOUNT = re.compile(r"\+?(\d+(?:\.\d+)?)\s*(%|KB|MB|GB|KiB|MiB|GiB|B)")
_FAULT = re.compile(r"noise:0\.\d*[1-9]\d*|black|swap-prompts|wrong-seed")
_READING = re.compile(r"throttle|process|canary:0\.\d*[1-9]\d*")
_KERNELS = ("fallback", "dequantise")
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def positive_int(option: str, text: str, base: Path) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise pytest.UsageError(f"{option} {text}: must be a whole number of at least 1")
    return value


def seconds(option: str, text: str, base: Path) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise pytest.UsageError(f"{option} {text}: must be a number of seconds above 0")
    return value


def seconds_or_none(option: str, text: str, base: Path) -> float:
    """0 is a number of seconds too."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise pytest.UsageError(f"{option} {text}: must be a number of seconds, 0 or more")
    return value


def injection(option: str, text: str, base: Path) -> tuple[str, float | str]:
    metric, _, amount = text.partition("=")
    if metric == "quality":
        if not _FAULT.fullmatch(amount):
            raise pytest.UsageError(
                f"{option} {text}: write quality=noise:0.05, quality=black, quality=swap-prompts or quality=wrong-seed"
            )
        return metric, amount
    if metric == "fitness":
        if not _READING.fullmatch(amount):
            raise pytest.UsageError(f"{option} {text}: write fitness=throttle, fitness=process or fitness=canary:0.8")
        return metric, amount
    if metric == "dispatch":
        if amount not in _KERNELS:
            raise pytest.UsageError(f"{option} {text}: write dispatch=fallback or dispatch=dequantise")
        return metric, amount
    match = _AMOUNT.fullmatch(amount.strip())
    known = {"warm_latency": "%", "cold_load": "%", "memory": "B"}
    if metric not in known or not match or (match[2] == "%") != (known[metric] == "%") or float(match[1]) <= 0:
        raise pytest.UsageError(
            f"{option} {text}: write METRIC=AMOUNT, for example warm_latency=+5%, cold_load=+40%, memory=+500MB"
            " or quality=black"
        )
    number = float(match[1])
    return metric, number / 100 if match[2] == "%" else number * _BYTES[match[2]]


def plain_text(option: str, text: str, base: Path) -> str:
    if not text.strip():
        raise pytest.UsageError(f"{option}: must not be empty")
    return text.strip()


def words(option: str, text: str, base: Path) -> tuple[str, ...]:
    """The words of a shell text."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise pytest.UsageError(f"{option} {text}: {error}") from error


def url(option: str, text: str, base: Path) -> str:
    """`http://host:port`, without a slash at its end."""
    parts = urlsplit(plain_text(option, text, base))
    try:
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fits = False
    if not fits or not text.isascii() or parts.query or parts.fragment or parts.username:
        raise pytest.UsageError(f"{option} {text}: write http://host:port")
    return text.strip().rstrip("/")


def path(option: str, text: str, base: Path) -> Path:
    return base / Path(plain_text(option, text, base)).expanduser()


def models(option: str, text: str, base: Path) -> str:
    """A folder by its whole path; what is no folder stays a name."""
    name = plain_text(option, text, base)
    folder = base / Path(name).expanduser()
    return str(folder) if "/" in name or (folder.is_dir() and not name.startswith("synthetic-")) else name
