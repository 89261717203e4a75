"""The stand-in's log, with the colours and the random order of the real one."""

from __future__ import annotations

import random
import sys

NATIVE = ["int8_tensorwise", "convrot_w4a4", "float8_e4m3fn"]
EMULATED = ["nvfp4", "mxfp8"]


class Logbook:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        line = f"\x1b[32m[INFO]\x1b[0m {line}"
        self.lines.append(line + "\n")
        print(line, file=sys.stderr, flush=True)

    def startup(self, version: str) -> None:
        self.say("Set vram state to: DISABLED")
        for name, there in (("triton", False), ("eager", True), ("cuda", False)):
            self.say(
                f"Found comfy_kitchen backend {name}: {{'available': {there}, 'disabled': False, 'capabilities': []}}"
            )
        self.say("Using pytorch attention")
        self.say(f"ComfyUI version: {version}")

    def loaded(self, kind: str) -> None:
        model = {"UNETLoader": "Lumina2", "CLIPLoader": "ZImageTEModel_", "VAELoader": "AutoencodingEngine"}[kind]
        if kind == "UNETLoader":
            native, emulated = (random.sample(names, len(names)) for names in (NATIVE, EMULATED))
            self.say(f"Native ops: \x1b[36m{', '.join(native)}\x1b[0m , emulated ops: {', '.join(emulated)}")
            self.say("model weight dtype torch.bfloat16, manual cast: None")
        self.say(f"Requested to load {model}")
        self.say(f"loaded completely; {random.random():.2f} MB usable, 1.00 MB loaded, full load: True")
