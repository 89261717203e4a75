"""How every engine keeps an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def write_png(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write `pixels` ([height, width, 3], RGB) and nothing else; the file is there as a whole or not at all.

    Raises `OSError`.
    """
    from PIL import Image

    # Beside it first: a later session takes an image at its word, and this process may be killed while it writes.
    partial = path.with_name(f".{path.name}.part")
    try:
        # The lightest compression: a tenth larger than the default's files, in a seventh of its time.
        Image.fromarray(pixels).save(partial, format="PNG", compress_level=1)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
