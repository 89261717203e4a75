"""`python -m pytest_zimage.checkpoints.synthetic`: write a synthetic model set, or say what one would hold."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from pytest_zimage.catalog import load_catalog
from pytest_zimage.catalog.model import ModelDims
from pytest_zimage.checkpoints.synthetic.ensure import SET_NAMES, set_dims
from pytest_zimage.errors import ZImageError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pytest_zimage.checkpoints.synthetic", description=__doc__)
    parser.add_argument("--set", dest="name", choices=SET_NAMES, required=True)
    parser.add_argument("--out", type=Path, help="the set's own folder")
    parser.add_argument("--files", nargs="*", metavar="NAME", help="these and the tokenizer; default: the default ones")
    parser.add_argument("--device", default="cpu", help="where the weights are made and quantised")
    parser.add_argument("--dims", help="dimensions as JSON instead of the catalogue's")
    parser.add_argument("--dry-run", action="store_true", help="print each file's tensors and bytes, write nothing")
    options = parser.parse_args(arguments)
    if not options.dry_run and options.out is None:
        parser.error("--out is needed")
    try:
        given = options.dims
        dims = msgspec.json.decode(given, type=ModelDims) if given else set_dims(options.name, load_catalog())
        _run(options, dims)
    except ZImageError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(options: argparse.Namespace, dims: ModelDims) -> None:
    from pytest_zimage.checkpoints.synthetic.requested import plan_set

    if options.dry_run:
        for plan in plan_set(dims, options.files):
            _, tensors, size = plan.header()
            print(f"{plan.path}: {len(tensors)} tensors, {size} bytes")
        return

    def say(line: str) -> None:
        print(line, flush=True)

    say(f"{options.name}: starting its writer")
    import torch

    from pytest_zimage.checkpoints.synthetic.build import build_model_set

    device = torch.device(options.device)
    if device.type == "cuda" and device.index is not None:
        # comfy-kitchen's kernels run on the current GPU, and refuse a tensor that lies on another.
        torch.cuda.set_device(device)
    build_model_set(options.name, dims, options.out, options.files, device=device, say=say)


if __name__ == "__main__":
    sys.exit(main())
