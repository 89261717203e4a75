"""What the catalogue holds: frozen rows, checked as they are read.

Every row is a TOML table; `loader` turns tables into these types and turns a mistake into an error that names file,
table and key.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

WeightDtype = Literal["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_online"]
Kernels = Literal["comfy", "plain"]
Unit = Literal["s", "bytes", "count", "score", "dB"]
"""`score`: a number without a unit, such as a cosine."""
Role = Literal["transformer", "text_encoder", "vae", "lora"]
ROLES: tuple[Role, ...] = ("transformer", "text_encoder", "vae", "lora")

#: The folders of ComfyUI's model layout that may hold each role, the preferred name first.
ROLE_FOLDERS: dict[Role, tuple[str, ...]] = {
    "transformer": ("diffusion_models", "unet"),
    "text_encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
    "lora": ("loras",),
}


class Variant(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One quantisation configuration: which files, computed how."""

    name: str
    title: str
    """The label of the published table, or the owner's own words."""
    transformer: str
    """Inside the model set's transformer folder: a file's name, or `NAME/` for a folder in diffusers' layout."""
    text_encoder: str
    vae: str = "ae.safetensors"
    lora: str = ""
    """File name of a LoRA of the transformer, inside the model set's `loras` folder; empty for none."""
    lora_strength: float = 1.0
    """Factor of the LoRA's product; negative turns it round."""
    weight_dtype: WeightDtype = "default"
    """ComfyUI's UNETLoader setting: keep the file's types, cast every parameter to FP8, or also multiply in FP8. Or
    `fp8_online`, vLLM-Omni's `--quantization fp8`: linears of the blocks get FP8 weights at load, of one scale each."""
    text_encoder_weight_dtype: Literal["default", "fp8_online"] = "default"
    """`fp8_online`: the same for the text encoder's linears, which vLLM-Omni quantises along."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    text_encoder_dtype: Literal["bfloat16", "float32"] = "float32"
    """Activations of the text encoder; ComfyUI runs float32 over any weight format."""
    vae_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    kernels: Kernels = "comfy"
    """`comfy`: fused qkv and comfy-kitchen's `rms_rope`, as ComfyUI; `plain`: diffusers' own modules."""
    attention: str = "native"
    """A backend of diffusers' attention dispatch: `native` (torch's choice), `flash`, `sage`, `_native_cudnn`, ... A
    server gets what its own settings call the same."""
    reference: str = "bf16"
    """The variant whose images this one's are held against."""
    twin: str = ""
    """The variant of the same weights that multiplies unquantised: equal images mean that this one does so too."""
    repository: str = ""
    """Hub repository, or folder, of the whole pipeline in diffusers' layout: what an engine reads that takes no single
    files."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile; every run compiles anew, inside its cold load."""
    default: bool = True
    """Whether it runs where no variant is asked for; False: only by name, glob or tag."""
    tags: tuple[str, ...] = ()
    lanes: tuple[str, ...] = ()
    """Device classes it may run on; empty means all."""

    def runs_on(self, lane: str) -> bool:
        """Whether it may run on the device class `lane`."""
        return not self.lanes or lane in self.lanes

    def files(self) -> dict[Role, str]:
        """File name, or `NAME/` of a folder, by role."""
        files: dict[Role, str] = {
            "transformer": self.transformer,
            "text_encoder": self.text_encoder,
            "vae": self.vae,
        }
        return {**files, "lora": self.lora} if self.lora else files


class ModelFile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is known of an official file beforehand."""

    name: str
    bytes: int
    """Size of the official file; 1e9-based tables print it rounded."""
    tensors: int | None = None
    source: str = ""


class Workload(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is drawn."""

    name: str
    title: str
    width: int
    height: int
    steps: int
    sampler: Literal["res_multistep", "euler"]
    schedule: Literal["simple"]
    shift: float
    guidance: float
    """diffusers' scale g of `v + g * (v - v_negative)`: ComfyUI's CFG less 1. 0 is none, with one forward a step."""
    seed: int
    prompt: str
    negative_prompt: str = ""
    """What guidance leads away from; only with a guidance above 0."""

    @property
    def forwards_per_step(self) -> int:
        """Sequences that the transformer computes in one step: with guidance that of the negative prompt too."""
        return 2 if self.guidance > 0 else 1


class Prompt(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One prompt of a set, with the seeds it is drawn with."""

    name: str
    text: str
    seeds: tuple[int, ...]
    more_seeds: tuple[int, ...] = ()
    """Drawn too, in this order, when a verdict stays inconclusive."""


class PromptSet(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What image quality is judged on."""

    name: str
    title: str
    prompts: tuple[Prompt, ...]
    width: int | None = None
    """None: the workload's own size."""
    height: int | None = None

    def pairs(self, more: int = 0) -> tuple[tuple[Prompt, int], ...]:
        """Every (prompt, seed), with the first `more` further seeds of each prompt."""
        return tuple((p, seed) for p in self.prompts for seed in (*p.seeds, *p.more_seeds[:more]))


class Metric(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one quantity is judged: the constants of the decision rule, editable."""

    name: str
    title: str
    """`{reference}` in it stands for the name of the variant's reference."""
    unit: Unit
    kind: Literal["sampled", "exact", "paired"]
    """`sampled` goes through the decision rule over runs, `paired` through the one over images of the same prompt and
    seed; `exact` must be equal, on every machine."""
    prior: float = 0.0
    """s0: relative run-to-run standard deviation assumed until this machine has shown its own."""
    floor: float = 0.0
    """The smallest standard deviation believed: relative for `sampled`, in the metric's unit for `paired`."""
    band: float = 0.0
    band_absolute: float = 0.0
    """In the metric's unit; the wider of the two bands counts."""
    max_runs: int = 1
    worse: str = "CHANGED"
    better: str = "CHANGED"
    direction: Literal["lower", "higher"] = "lower"
    """Which way is good; `exact` knows none."""
    portable: Literal["always", "between-cpus", "never"] | None = None
    """Where one baseline serves many machines. None: `exact` always, `sampled` never, `paired` between CPUs."""
    margin: float = 0.0
    """`paired`, in its unit, as are the next ones: the mean change that does not matter."""
    guard: float = 0.0
    """A single image worse by more than this is a regression, whatever the mean."""
    limits: tuple[float, float] | None = None
    """Lowest and highest score that can be."""
    cap: float | None = None
    """Scores beyond count as this: equal images have an infinite PSNR."""
    ceiling_room: float | None = None
    """A first baseline sets the variant's absolute ceiling this far above its mean; None: there is no ceiling."""
    controls: bool = False
    """Whether the scorer is unfit for a prompt whose control images do not lose."""
    required: bool = True
    """False: a baseline file without it is no gap, the figure is shown and not judged."""

    def __post_init__(self) -> None:
        if self.kind != "paired":
            return
        for key in ("margin", "guard", "floor"):
            value = getattr(self, key)
            if not 0 < value < float("inf"):
                raise ValueError(f"key {key!r}: {value} is not above 0 and finite, as 'paired' needs")
        if self.guard < self.margin:
            raise ValueError(f"key 'guard': {self.guard} is below the margin {self.margin}")
        if self.limits is not None and not self.limits[0] < self.limits[1]:
            raise ValueError(f"key 'limits': {list(self.limits)} is not lowest, highest")
        if self.ceiling_room is not None and (self.direction != "lower" or not 0 < self.ceiling_room < float("inf")):
            raise ValueError("key 'ceiling_room': needs a finite number above 0 and direction 'lower'")


class ModelDims(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The configuration of the three networks of a model set, as keyword arguments of their own config classes."""

    name: str
    transformer: dict[str, object]
    text_encoder: dict[str, object]
    vae: dict[str, object]
