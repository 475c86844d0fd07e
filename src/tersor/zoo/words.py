"""Words: the network that words name: the user's own, a library's, one of the zoo, or a folder's.

file.py:factory, package.module:factory      the user's code: the module, or a function that returns it
torchvision:NAME, timm:NAME, zoo:NAME        an architecture, untrained
hf:FOLDER                                    a folder of Hugging Face's transformers, with its weights
FILE.pt2                                     a program of torch.export: model/program_builder.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from tersor.errors import RefusedError, SettingError
from tersor.model.import_object import import_object
from tersor.model.program_builder import program_in
from tersor.model.transformers_folder import transformers_model
from tersor.zoo.architectures import zoo_model
from tersor.zoo.libraries import timm_model, torchvision_model

PROGRAM = ".pt2"
BUILDERS: dict[str, Callable[[str], nn.Module]] = {  # word -> name -> network
    "torchvision": torchvision_model, "timm": timm_model, "zoo": zoo_model,
}  # fmt: skip


def network_of(text: str, noun: str = "model") -> nn.Module:
    """The network that words name. `noun` is for messages. SettingError, or MissingError for a package."""
    word, _, name = text.partition(":")
    if word in BUILDERS:
        return BUILDERS[word](name)
    if (folder := folder_of(text)) is not None:
        return transformers_model(folder)
    if text.endswith(PROGRAM):
        return program_in(text, noun)
    module: nn.Module = import_object(text, noun, SettingError, nn.Module)
    return module


def folder_of(text: str) -> Path | None:
    """The folder that hf:FOLDER names; None for other words."""
    word, _, name = text.partition(":")
    return Path(name) if word == "hf" else None


def load_weights(module: nn.Module, path: str, noun: str) -> None:
    """Load all weights of a .safetensors file. SettingError without such a file, RefusedError if names or
    shapes differ."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    if not path.endswith(".safetensors"):
        raise SettingError(
            f"{noun}: {path} is no .safetensors file; tersor unpack makes one of a .tersor file, and "
            "safetensors.torch.save_model of a module"
        )
    try:
        load_model(module, path)
    except OSError as error:
        raise SettingError(f"{noun}: {path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError) as error:
        raise RefusedError(f"{noun}: {path} does not fit: {' '.join(str(error).split())[:400]}") from None
