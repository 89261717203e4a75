"""Finding scorer weights, and telling one set of weights from another. Safetensors only: nothing is unpickled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from pytest_zimage.errors import CheckpointError, MissingFileError, UnsupportedError

#: The names under which open_clip's publishers put safetensors into a repository, the usual one first.
HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
_PICKLES = ("open_clip_pytorch_model.bin", "pytorch_model.bin")

ALEXNET = "alexnet-owt-7be5be79"


def find_clip(arch: str, tag: str, repository: str, *, folder: str, allow_download: bool) -> Path:
    """The safetensors file of open_clip's pretrained `tag` of `arch`, published in the hub's `repository`.

    Looked for in `folder`, then in the hub's cache, then, if allowed, on the hub. Raises `MissingFileError` with
    everything searched, `UnsupportedError` for weights that are published as pickles only.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    searched = []
    if folder:
        inside = [f"{arch}-{tag}.safetensors", *(f"{Path(repository).name}/{name}" for name in HUB_NAMES), *HUB_NAMES]
        for candidate in (Path(folder) / name for name in inside):
            if candidate.is_file():
                return candidate
        searched.append(f"{folder} ({inside[0]}, {HUB_NAMES[0]})")
    if not repository:
        raise UnsupportedError(
            f"{arch}:{tag} is published as a pickle only, which is never read",
            mend="choose a pretrained tag that is on the hub, or put safetensors weights of it into the scorer folder",
        )
    for name in HUB_NAMES:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    searched.append(f"the hub's cache {constants.HF_HUB_CACHE} ({repository})")
    if allow_download:
        for name in HUB_NAMES:
            try:
                return Path(hf_hub_download(repository, name))
            except EntryNotFoundError:
                continue
            except Exception as error:  # its family of network errors has no common base
                raise MissingFileError(
                    f"{arch}:{tag}: the hub did not give {repository}/{name}: {error}", mend=_fetch(repository, name)
                ) from error
        searched.append(f"the hub ({repository} has no safetensors file)")
    pickled = [name for name in _PICKLES if isinstance(try_to_load_from_cache(repository, name), str)]
    found = f"; {pickled[0]} is there, but it is a pickle and is not read" if pickled else ""
    raise MissingFileError(
        f"CLIP weights of {arch}:{tag} not found; searched {'; '.join(searched)}{found}",
        mend=f"{_fetch(repository, HUB_NAMES[0])}; or allow the download; or use the scorer tiny-clip",
    )


def find_alexnet(folder: str) -> Path:
    """The safetensors file of torchvision's AlexNet, LPIPS' backbone. Raises `MissingFileError`.

    torchvision publishes it as a pickle only, so the user converts it once, and the conversion lies beside it.
    """
    name = f"{ALEXNET}.safetensors"
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    places = [*([Path(folder)] if folder else []), checkpoints]
    for place in places:
        if (place / name).is_file():
            return place / name
    pickled = next((p / f"{ALEXNET}.pth" for p in places if (p / f"{ALEXNET}.pth").is_file()), None)
    found = f"; {pickled} is there, but it is a pickle and is not read" if pickled else ""
    origin = pickled or Path(f"{ALEXNET}.pth")
    target = origin.with_suffix(".safetensors") if pickled else checkpoints / name
    fetch = "" if pickled else f"fetch https://download.pytorch.org/models/{ALEXNET}.pth and "
    raise MissingFileError(
        f"AlexNet weights for LPIPS not found: {name}; searched {', '.join(map(str, places))}{found}",
        mend=f'{fetch}convert it once, where you trust it: python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{origin}', weights_only=True), '{target}')\"; or use the scorer tiny-alex",
    )


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of `path`, on the host. Raises `CheckpointError` for a file that is cut short or another format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors: {error}", mend="fetch the file again, as safetensors"
        ) from error


def state_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Over names, types, shapes and bytes of `state` in the order of the names, whatever file it came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fetch(repository: str, name: str) -> str:
    return f"hf download {repository} {name}"
