"""Does the quality gate stay silent when nothing changed? The quality suite, again and again, each in a fresh session.

    python benchmarks/quality_repeat.py [--times 10] [--config nvfp4,bf16]

Every session draws its images anew and is judged by the repository's baselines of the tiny model. Exits with 1 if any
verdict of any session is neither a pass nor UNFIT (the tiny CLIP is blind, and says so).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def session(folder: Path, config: str) -> Counter[str]:
    """Verdicts of one session, counted by word."""
    results = folder / "results.json"
    command = [sys.executable, "-m", "pytest", str(REPOSITORY / "suites" / "test_quality.py"), "-q"]
    command += [f"--rootdir={folder}", f"--zimage-baselines={REPOSITORY / 'baselines'}", f"--zimage-results={results}"]
    command += ["--zimage-device=cpu", f"--zimage-config={config}", "--zimage-rounds=1", "-p", "no:cacheprovider"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False)
    data = json.loads(results.read_text(encoding="utf-8"))
    found = Counter(row["verdict"] for row in data["verdicts"])
    found.update({"ERROR": len(data["errors"])} if data["errors"] else {})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--config", default="nvfp4,bf16")
    arguments = parser.parse_args()
    total: Counter[str] = Counter()
    for number in range(1, arguments.times + 1):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "pytest.ini").write_text("[pytest]\n")
            found = session(Path(folder), arguments.config)
        total += found
        print(f"{number:3}: " + ", ".join(f"{count} {word}" for word, count in sorted(found.items())), flush=True)
    alarms = sum(count for word, count in total.items() if word not in ("PASS", "UNFIT"))
    print(f"{arguments.times} sessions, {total.total()} verdicts: {alarms} alarms")
    return int(alarms > 0 or not total["PASS"])


if __name__ == "__main__":
    sys.exit(main())
