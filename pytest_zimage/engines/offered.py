"""The engines that are shipped. Each is imported when it is made: a session has one of them, or two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_zimage.stash import SESSION

if TYPE_CHECKING:
    from pytest_zimage.engines.base import Engine, EngineFactory
    from pytest_zimage.options import Settings


def offered(config: pytest.Config) -> dict[str, EngineFactory]:
    """By the names of `--zimage-engine`."""

    def settings() -> Settings:
        return config.stash[SESSION].settings

    def diffusers() -> Engine:
        from pytest_zimage.engines.local import LocalEngine

        return LocalEngine()

    def comfyui() -> Engine:
        from pytest_zimage.engines.comfyui.engine import ComfyUIEngine

        return ComfyUIEngine(settings())

    def vllm_omni() -> Engine:
        from pytest_zimage.engines.vllm_omni.engine import VllmOmniEngine

        return VllmOmniEngine(settings())

    return {"diffusers": diffusers, "comfyui": comfyui, "vllm-omni": vllm_omni}
