"""The stand-in's log, with the colours and the random order of the real one."""

from __future__ import annotations

import random
import sys

NATIVE = ["int8_tensorwise", "convrot_w4a4", "float8_e4m3fn"]
EMULATED = ["nvfp4", "mxfp8"]


class Logbook:
    def __init__(self, gpu: str, dynamic_vram: bool) -> None:
        self._gpu, self._dynamic_vram = gpu, dynamic_vram
        self.lines: list[str] = []
        self._warned: set[str] = set()

    def say(self, line: str) -> None:
        line = f"\x1b[32m[INFO]\x1b[0m {line}"
        self.lines.append(line + "\n")
        print(line, file=sys.stderr, flush=True)

    def warn(self, line: str) -> None:
        """As Python does: the same warning once in the life of a process."""
        if line not in self._warned:
            self._warned.add(line)
            self.say(line)

    def startup(self, version: str) -> None:
        self.say(f"Set vram state to: {'NORMAL_VRAM' if self._gpu else 'DISABLED'}")
        if self._gpu:
            self.say(f"DynamicVRAM support {'detected and enabled' if self._dynamic_vram else 'disabled'}")
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
        if kind == "UNETLoader" and self._dynamic_vram:
            self.say(f"Model {model} prepared for dynamic VRAM loading. 11739MB Staged. 0 patches attached.")
            return
        self.say(f"Requested to load {model}")
        self.say(f"loaded completely; {random.random():.2f} MB usable, 1.00 MB loaded, full load: True")
