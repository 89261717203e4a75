"""A stand-in of a ComfyUI server: the documented API over a graph that it really executes, without any weights.

Started as the real one is, `python main.py --port N ...`; like it, it refuses flags that it does not know.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_OURS = {"step_ms": 2.0, "load_ms": 5.0}
_WITHOUT_FP8 = {"NVIDIA A100-SXM4-80GB"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--extra-model-paths-config", action="append", nargs="+", default=[], type=Path)
    for name in ("output", "temp", "user", "input"):
        parser.add_argument(f"--{name}-directory", type=Path)
    parser.add_argument("--preview-method", choices=["none", "auto"])
    parser.add_argument("--cache-none", action="store_true")
    for name in ("disable-auto-launch", "disable-metadata", "disable-all-custom-nodes", "cpu", "fp32-unet", "fp32-vae"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--use-sage-attention", action="store_true")
    parser.add_argument("--disable-dynamic-vram", action="store_true")
    parser.add_argument("--gpu", default="", help="what it says it draws on, instead of the CPU")
    parser.add_argument("--fault-script", type=Path, help="what goes wrong on purpose")
    parser.add_argument("--own-ids", action="store_true", help="ignore the client's prompt ids, as before 0.3.50")
    for name, value in _OURS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value)
    return parser.parse_args()


class Options:
    """The flags, and the files in the folders that they name."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.step_ms, self.load_ms = flags.step_ms, flags.load_ms
        self.cache_none, self.own_ids = flags.cache_none, flags.own_ids
        self.gpu, self.dynamic_vram = flags.gpu, bool(flags.gpu) and not flags.disable_dynamic_vram
        self.plain_cast = self.dynamic_vram or not flags.gpu or flags.gpu in _WITHOUT_FP8
        self._tables: list[dict[str, Any]] = [
            table
            for paths in flags.extra_model_paths_config
            for path in paths
            for table in json.loads(path.read_text(encoding="utf-8")).values()
        ]

    def files(self) -> dict[str, list[str]]:
        """Names by folder, those below a folder with its name."""
        return {
            folder: sorted({str(path.relative_to(root)) for root in self._roots(folder) for path in _below(root)})
            for folder in ("diffusion_models", "text_encoders", "vae", "loras")
        }

    def path_of(self, input: str, name: str) -> Path:
        from nodes import FILES

        return next(root / name for root in self._roots(FILES[input]) if (root / name).is_file())

    def _roots(self, folder: str) -> list[Path]:
        return [Path(table["base_path"]) / table[folder] for table in self._tables if folder in table]


def _below(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def main() -> None:
    flags = parse()
    from aiohttp import web
    from faults import Faults
    from logbook import Logbook
    from routes import ROUTES, VERSION, WORKER, starting
    from worker import Worker

    options = Options(flags)
    log, faults = Logbook(options.gpu, options.dynamic_vram), Faults()
    if flags.fault_script and flags.fault_script.exists():
        faults.read(flags.fault_script)
        if faults.start.get("once"):
            flags.fault_script.unlink()
    log.startup(VERSION)
    if "dies" in faults.start:
        raise SystemExit(faults.start["dies"])

    async def made() -> web.Application:
        app = web.Application(middlewares=[starting])
        app.add_routes(ROUTES)
        app[WORKER] = Worker(options, log, faults)

        async def working(app: web.Application) -> Any:
            import asyncio

            tasks = [asyncio.ensure_future(work()) for work in (app[WORKER].run, app[WORKER].monitor)]
            yield
            for task in tasks:
                task.cancel()

        app.cleanup_ctx.append(working)
        return app

    web.run_app(made(), host=flags.listen, port=flags.port, print=None, access_log=None, shutdown_timeout=0.1)


if __name__ == "__main__":
    main()
