"""Transformers folder: the model in a local folder of Hugging Face's transformers, `hf:FOLDER`.

class     the first of the `architectures` in config.json, else the model without a head
weights   those of the folder, in the dtype that they are stored in
Nothing is downloaded, no code of the folder is run. A tensor that the folder lacks would be random: refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tersor.errors import FormatError, RefusedError, SettingError, few, first_line, need

# What transformers raises for folders that it cannot read.
FAILED = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError)
ADAPTER = "adapter_config.json"


def transformers_model(folder: Path) -> nn.Module:
    """The model of a folder, in eval mode, as transformers loads it.

    MissingError without transformers, SettingError for a path that is no such folder, RefusedError for one
    that transformers cannot load completely.
    """
    check_folder(folder)
    try:
        import transformers
    except ImportError:
        raise need("transformers", "transformers", f"model hf:{folder}") from None
    new = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (4, 56)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), **local)
        kind = class_of(transformers, config, folder)
        dtype = {"dtype" if new else "torch_dtype": "auto"}
        model, report = kind.from_pretrained(
            str(folder), config=config, output_loading_info=True, **local, **dtype
        )
    except FAILED as error:
        raise RefusedError(
            f"model: hf:{folder}: transformers cannot load it: {first_line(error)[:300]}"
        ) from None
    if lacking := sorted(report["missing_keys"]):
        raise RefusedError(
            f"model: hf:{folder}: its weights lack {few(lacking)}, which {kind.__name__} has: they would be "
            f"random. Give the class that was saved, in `architectures` of config.json"
        )
    module: nn.Module = model
    return module.eval()


def check_folder(folder: Path) -> None:
    """SettingError unless this is a local folder with a configuration of a whole model."""
    if not folder.is_dir():
        raise SettingError(
            f"model: hf:{folder}: there is no such folder. Only local folders are read: download it first, "
            f"or save it: model.save_pretrained({folder.name!r})"
        )
    if (folder / ADAPTER).exists():
        raise SettingError(
            f"model: hf:{folder}: it holds an adapter ({ADAPTER}), not a whole model. Merge it into its "
            f"model and save that: merge_and_unload().save_pretrained(FOLDER)"
        )
    if not (folder / "config.json").is_file():
        raise SettingError(
            f"model: hf:{folder}: it has no config.json, as save_pretrained writes it. For weights alone "
            f"name the code: file.py:factory with --weights {folder}"
        )


def class_of(transformers: Any, config: Any, folder: Path) -> Any:
    """The class that a configuration names."""
    names = getattr(config, "architectures", None) or []
    if not names:
        return transformers.AutoModel
    kind = getattr(transformers, names[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise FormatError(
            f"model: hf:{folder}: transformers {transformers.__version__} has no model "
            f"{str(names[0])[:80]!r}. If the folder brings its own code, import it in a file of yours: "
            f"file.py:factory"
        )
    return kind
