"""Fingerprints and previews that a baseline keeps of its images.

A fingerprint is the SHA-256 of the decoded pixels. Previews are small files in `<variant>.previews/` beside the
baseline, named after their content, so that a file never changes: new ones are there before the baseline that names
them, old ones go after it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from pytest_zimage.baselines.schema import BaseImages
from pytest_zimage.baselines.writing import write_atomically
from pytest_zimage.errors import BaselineError

PREVIEW_BYTES = 8 * 1024
"""Most of one preview."""
CLASS_BYTES = 5 * 1024 * 1024
"""Most of all previews of one device class (or of the portable layer)."""
_PREVIEW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.(jpg|png|webp)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUFFIXES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"RIFF", "webp"))


def is_fingerprint(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


def is_preview_name(text: str) -> bool:
    """Whether `text` is the plain name of a preview file: nothing else may be opened for a report."""
    return _PREVIEW_NAME.fullmatch(text) is not None


def digest(fingerprints: Mapping[str, str], pairs: Iterable[str]) -> str:
    """One SHA-256 over the fingerprints of `pairs`, in any order; "" if one is unknown or there are none."""
    names = sorted(pairs)
    if not names or any(pair not in fingerprints for pair in names):
        return ""
    return hashlib.sha256("".join(f"{pair}={fingerprints[pair]}\n" for pair in names).encode()).hexdigest()


def previews_folder(baseline: Path) -> Path:
    """Where the previews of the baseline file `baseline` lie."""
    return baseline.with_suffix(".previews")


def preview_name(pair: str, data: bytes) -> str:
    """File name of a preview; `BaselineError` for anything that is not a JPEG, PNG or WebP of at most 8 KiB."""
    suffix = next((suffix for magic, suffix in _SUFFIXES if data.startswith(magic)), "")
    if not suffix:
        raise BaselineError(f"the preview of {pair} is no JPEG, PNG or WebP", mend="report this as a bug")
    if len(data) > PREVIEW_BYTES:
        raise BaselineError(
            f"the preview of {pair} has {len(data)} bytes, at most {PREVIEW_BYTES} are kept",
            mend="make it smaller or of lower quality",
        )
    return f"{pair.replace('/', '-')}-{hashlib.sha256(data).hexdigest()[:8]}.{suffix}"


def put_previews(baseline: Path, images: BaseImages | None, previews: Mapping[str, bytes], root: Path) -> None:
    """Write those of `previews` (by file name) that `images` names. The caller holds the folder's lock.

    `root` is the folder of the device class. Raises `BaselineError` where the class would outgrow its share, and writes
    nothing then.
    """
    named = set(images.previews.values()) if images else set()
    folder = previews_folder(baseline)
    wanted = {name: data for name, data in previews.items() if name in named}
    if not wanted:
        return
    others = sum(
        path.stat().st_size
        for path in root.glob("*/*.previews/*")
        if path.parent != folder or (path.name in named and path.name not in wanted)
    )
    total = others + sum(map(len, wanted.values()))
    if total > CLASS_BYTES:
        raise BaselineError(
            f"{root}: the previews of this device class would take {total} bytes, at most {CLASS_BYTES} are kept",
            mend="record fewer variants or seeds with previews, or remove *.previews folders that nobody looks at",
        )
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise BaselineError(
            f"{folder}: cannot be made: {error.strerror}", mend="make the folder writable, or free space"
        ) from error
    for name, data in wanted.items():
        if not (folder / name).exists():
            write_atomically(folder / name, data)


def prune_previews(baseline: Path, images: BaseImages | None) -> None:
    """Remove what the stored baseline does not name any more."""
    folder = previews_folder(baseline)
    if not folder.is_dir():
        return
    named = set(images.previews.values()) if images else set()
    # A preview left behind harms nobody; the next update tries again.
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name not in named:
                path.unlink()
        if not named:
            folder.rmdir()
