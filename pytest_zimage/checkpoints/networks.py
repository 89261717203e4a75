"""The three networks of Z-Image as the model libraries know them: configurations, shapes, and shells without storage.

Heavy imports are inside the functions: the shapes are also wanted where no network is ever built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_zimage.catalog.model import ModelDims, Role
from pytest_zimage.errors import CatalogError

if TYPE_CHECKING:
    from torch import nn

_VAE_CONSTANTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
"""What every VAE of the Flux family has, as Tongyi-MAI/Z-Image-Turbo vae/config.json."""


def meta_network(role: Role, dims: ModelDims, kind: type[Any] | None = None) -> Any:
    """The network of `role` with every tensor on `meta`; `kind` replaces the library's class by a subclass of it.

    Raises `CatalogError` for dimensions that the class refuses.
    """
    import torch
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    try:
        if role == "transformer":
            with torch.device("meta"):
                return (kind or ZImageTransformer2DModel)(**dims.transformer)
        if role == "text_encoder":
            config: Any = Qwen3Config
            with torch.device("meta"):
                return (kind or Qwen3Model)(config(**dims.text_encoder))
        with torch.device("meta"):
            return (kind or AutoencoderKL)(**_vae_config(dims))
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise CatalogError(
            f"[models.{dims.name}.{role}]: the network refuses these dimensions: {error}", mend="correct that table"
        ) from error


def network_shapes(role: Role, dims: ModelDims) -> dict[str, tuple[int, ...]]:
    """Every parameter of the network of `role` by its name in diffusers or transformers, with its shape."""
    network: nn.Module = meta_network(role, dims)
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def _vae_config(dims: ModelDims) -> dict[str, Any]:
    levels = len(dims.vae["block_out_channels"])  # type: ignore[arg-type]
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return {**_VAE_CONSTANTS, **blocks, **dims.vae}
