"""The catalogue: variants, workloads, device classes, metrics and model configurations, as TOML people edit."""

from pytest_zimage.catalog.catalog import Catalog
from pytest_zimage.catalog.claims import Claim
from pytest_zimage.catalog.device_class import DeviceClass, FitnessLimits
from pytest_zimage.catalog.loader import load_catalog
from pytest_zimage.catalog.model import (
    ROLE_FOLDERS,
    ROLES,
    Metric,
    ModelDims,
    ModelFile,
    Prompt,
    PromptSet,
    Role,
    Variant,
    Workload,
)

__all__ = [
    "ROLES",
    "ROLE_FOLDERS",
    "Catalog",
    "Claim",
    "DeviceClass",
    "FitnessLimits",
    "Metric",
    "ModelDims",
    "ModelFile",
    "Prompt",
    "PromptSet",
    "Role",
    "Variant",
    "Workload",
    "load_catalog",
]
