"""What the harness adds to an image: the engine's `draw` against the same pipeline in a bare loop, in one process.

    python benchmarks/harness_overhead.py [--pairs 100] [--variant bf16] [--device cpu]

Both sides do the same work (prompt, noise, steps, decoding, pixels) with the same pipeline object, image by image in
turn, so that a drift of the machine hits both. Two figures: what the clock's marks add to the seconds reported, and
what a round takes from outside, with checks, hashing and a progress line. Exits with 1 if the median of the second is
above 1 ms + 0.1 % of an image.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import torch

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints.modelset import open_model_set
from pytest_zimage.engines.diffusers_engine import DiffusersEngine
from pytest_zimage.engines.protocol import Draw, Load, Progress, encode
from pytest_zimage.options import user_cache

LIMIT_S, LIMIT_SHARE = 1e-3, 1e-3


def load(variant: str, device: str) -> tuple[DiffusersEngine, Load]:
    catalog = load_catalog()
    chosen = catalog.variant(variant)
    models = open_model_set("synthetic-tiny", catalog, cache=user_cache())
    models.ensure(chosen.files().values())
    request = Load(
        variant=chosen,
        workload=catalog.workload("turbo-tiny"),
        dims=models.dims,
        files={role: str(path) for role, path in models.files(chosen).items()},
        tokenizer=str(models.find_tokenizer()),
        device=device,
    )
    engine = DiffusersEngine()
    engine.load(request)
    return engine, request


def bare(pipeline, workload, device: torch.device) -> float:
    """Seconds of one image by the plain pipeline call; the prompt is encoded unpadded, as the engine does."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    begin = time.perf_counter()
    with torch.inference_mode():
        tokenizer = pipeline.tokenizer
        messages = [{"role": "user", "content": workload.prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        ids = tokenizer(text, return_tensors="pt").input_ids.to(device)
        states = pipeline.text_encoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        image = pipeline(
            prompt_embeds=[states[-2][0].to(pipeline.transformer.dtype)],
            height=workload.height,
            width=workload.width,
            num_inference_steps=workload.steps,
            sigmas=[1 - step / workload.steps for step in range(workload.steps)],
            guidance_scale=workload.guidance,
            generator=torch.Generator("cpu").manual_seed(workload.seed),
            output_type="pt",
        ).images[0]
        (image.permute(1, 2, 0).float() * 255).round().to(torch.uint8).contiguous().cpu()
    synchronise()
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--variant", default="bf16")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    engine, request = load(arguments.variant, arguments.device)
    device = torch.device(arguments.device)
    pipeline = engine.pipeline
    bare_s, reported_s, outside_s = [], [], []
    with open(os.devnull, "wb", buffering=0) as pipe:

        def progress(stage: str, done: int, total: int) -> None:
            pipe.write(encode(Progress(stage, done, total)))

        for turn in range(arguments.pairs + 3):
            alone = bare(pipeline, request.workload, device)
            begin = time.perf_counter()
            (round_,) = engine.draw(Draw(rounds=1), progress).rounds
            outside = time.perf_counter() - begin
            if turn >= 3:  # the first images warm both sides up
                bare_s.append(alone)
                reported_s.append(round_.seconds)
                outside_s.append(outside)
    image_s = statistics.median(bare_s)
    limit_s = LIMIT_S + LIMIT_SHARE * image_s
    print(f"{arguments.variant} on {arguments.device}: bare image {image_s * 1e3:.2f} ms, {arguments.pairs} pairs")
    for what, side in (("reported seconds", reported_s), ("a round from outside", outside_s)):
        extra = sorted(a - b for a, b in zip(side, bare_s, strict=True))
        quarter = len(extra) // 4
        print(
            f"{what}: {statistics.median(extra) * 1e3:+.3f} ms over bare"
            f" (quartiles {extra[quarter] * 1e3:+.3f} .. {extra[-quarter - 1] * 1e3:+.3f})"
        )
    overhead_s = statistics.median(a - b for a, b in zip(outside_s, bare_s, strict=True))
    print(f"limit {limit_s * 1e3:.3f} ms a round: {'met' if overhead_s <= limit_s else 'EXCEEDED'}")
    return int(overhead_s > limit_s)


if __name__ == "__main__":
    sys.exit(main())
