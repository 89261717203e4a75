"""What the installed plugin costs every pytest run on the machine: an empty run with it against `-p no:zimage`.

    python benchmarks/import_cost.py [--pairs 15]

Runs alternate, so that a drift of the machine hits both sides. Exits with 1 if the median difference of the pairs is
above the limit, or if the plugin imported something heavy.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_MS = 30.0
HEAVY = ("torch", "diffusers", "numpy", "scipy", "msgspec", "transformers", "comfy_kitchen", "pynvml")


def run_ms(folder: Path, *arguments: str) -> float:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, str(folder)]
    begin = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - begin) * 1e3


def imported(folder: Path) -> list[str]:
    """Heavy modules that an empty run with the plugin has in memory at its end."""
    code = (
        "import pytest, sys\n"
        f"status = pytest.main(['-q', '-p', 'no:cacheprovider', {str(folder)!r}])\n"
        f"print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    return next(line for line in done.stdout.splitlines() if line.startswith("heavy:")).split()[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_empty.py").write_text("def test_empty():\n    pass\n")
        for arguments in ((), ("-p", "no:zimage")):
            run_ms(folder, *arguments)
        with_plugin, without = [], []
        for _ in range(pairs):
            with_plugin.append(run_ms(folder))
            without.append(run_ms(folder, "-p", "no:zimage"))
        heavy = imported(folder)
    cost = statistics.median(a - b for a, b in zip(with_plugin, without, strict=True))
    print(f"empty pytest run: {statistics.median(with_plugin):.0f} ms with the plugin,", end=" ")
    print(f"{statistics.median(without):.0f} ms without; median difference of {pairs} pairs {cost:+.1f} ms")
    print(f"limit {LIMIT_MS:.0f} ms; heavy modules imported: {', '.join(heavy) or 'none'}")
    return int(cost > LIMIT_MS or bool(heavy))


if __name__ == "__main__":
    sys.exit(main())
