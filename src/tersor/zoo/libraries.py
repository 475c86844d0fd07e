"""Libraries: architectures of torchvision and timm by name, without weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from tersor.errors import SettingError, did_you_mean, need


def torchvision_model(name: str, **given: Any) -> nn.Module:
    """`given`: arguments of the architecture, such as num_classes. SettingError, or MissingError."""
    try:
        from torchvision import models
    except ImportError:
        raise need("torchvision", "vision", f"model torchvision:{name}") from None
    if name not in models.list_models():
        raise SettingError(f"model: torchvision has no {name!r}; {did_you_mean(name, models.list_models())}")
    module: nn.Module = models.get_model(name, weights=None, **given)
    return module


def timm_model(name: str, **given: Any) -> nn.Module:
    """`given`: arguments of the architecture, such as num_classes. SettingError, or MissingError."""
    try:
        from timm import create_model, is_model, list_models
    except ImportError:
        raise need("timm", "zoo", f"model timm:{name}") from None
    if not is_model(name):
        raise SettingError(f"model: timm has no {name!r}; {did_you_mean(name, list_models())}")
    module: nn.Module = create_model(name, pretrained=False, **given)
    return module
