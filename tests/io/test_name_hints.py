"""Name hints: scales, masks and packed weights of a weights file stay unchanged and are named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor.core.recipe import Recipe
from tersor.forms import Dense
from tersor.io.container import load
from tersor.io.header import Slot
from tersor.io.name_hints import describe, is_causal
from tersor.io.pack import pack
from tersor.steps import Prune, Quantize, Rdoq

GENERATOR = torch.Generator().manual_seed(0)


def floats(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR) + 0.1


CAUSAL = torch.ones(1, 1, 6, 6).tril()
FILE: dict[str, Tensor] = {
    "h.0.attn.c_attn.weight": floats(8, 24),
    "h.0.attn.bias": CAUSAL.clone(),
    "h.0.attn.masked_bias": torch.tensor(-1e4),
    "embeddings.position_ids": torch.arange(12)[None],
    "mlp.qweight": torch.randint(-99, 99, (4, 16), dtype=torch.int32),
    "mlp.qzeros": torch.randint(-99, 99, (2, 2), dtype=torch.int32),
    "mlp.scales": floats(2, 16).half(),
    "mlp.g_idx": torch.arange(32, dtype=torch.int32) // 16,
    "mlp.down.weight_scale_inv": floats(4, 4),
    "mlp.up.weight_scale": floats(16, 1),
    "conv.weight": floats(6, 6, 3, 3),
    "gain": floats(1, 8, 1, 1),
    "bn.running_mean": floats(8),
    "bn.weight": floats(8),
    "kernel.weight": floats(1, 1, 5, 5),
}
WEIGHTS = {"h.0.attn.c_attn.weight", "conv.weight", "kernel.weight"}


@pytest.mark.parametrize("step", [Prune(keep=0.3, per="tensor"), Quantize(bits=4)], ids=["prune", "quantize"])
def test_tensors_that_are_not_weights_stay_and_are_named(tmp_path: Path, step: object) -> None:
    save_file(FILE, tmp_path / "w.safetensors")
    packed = pack(tmp_path / "w.safetensors", tmp_path / "w.tersor", Recipe((step,)))
    loaded = load(tmp_path / "w.tersor")
    found = loaded.state_dict()
    changed = {name for name, value in FILE.items() if not torch.equal(found[name], value)}
    assert changed == WEIGHTS
    assert {edit.site for edit in loaded.ledger.edits()} == WEIGHTS
    assert dict(packed.left) == {
        "running statistics": ["bn.running_mean"],
        "mask": ["h.0.attn.bias"],
        "buffer": ["embeddings.position_ids", "h.0.attn.masked_bias"],
        "packed": ["mlp.g_idx", "mlp.qweight", "mlp.qzeros"],
        "scale": ["mlp.down.weight_scale_inv", "mlp.up.weight_scale", "mlp.scales"],
        "one long axis": ["gain"],
    }
    (note,) = loaded.ledger.notes("left")
    for name in ("h.0.attn.bias", "mlp.scales", "gain", "mlp.qweight"):
        assert name in note.text


def test_a_mask_stays_when_vectors_are_compressed(tmp_path: Path) -> None:
    save_file(FILE, tmp_path / "w.safetensors")
    packed = pack(tmp_path / "w.safetensors", tmp_path / "w.tersor", Recipe((Rdoq(bits=3),)))
    found = load(tmp_path / "w.tersor").state_dict()
    assert torch.equal(found["h.0.attn.bias"], CAUSAL)
    assert not torch.equal(found["conv.weight"], FILE["conv.weight"])
    for name in ("mlp.scales", "mlp.down.weight_scale_inv", "mlp.up.weight_scale"):
        assert torch.equal(found[name], FILE[name]), name
    assert dict(packed.left)["mask"] == ["h.0.attn.bias"]


def test_a_glob_that_names_a_scale_picks_it(tmp_path: Path) -> None:
    save_file(FILE, tmp_path / "w.safetensors")
    pack(
        tmp_path / "w.safetensors", tmp_path / "w.tersor", Recipe((Quantize(bits=4, where="*.weight_scale"),))
    )
    assert [e.site for e in load(tmp_path / "w.tersor").ledger.edits()] == ["mlp.up.weight_scale"]


def test_masks_are_recognized_by_values() -> None:
    assert is_causal(Dense(CAUSAL))
    assert is_causal(Dense(CAUSAL.to(torch.bool)))
    for other in (CAUSAL.mT, CAUSAL * 2, CAUSAL[..., :5], torch.ones(1, 1, 1, 1), CAUSAL.expand(1, 2, 6, 6)):
        assert not is_causal(Dense(other))


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("fc.weight", (3, 4), "linear"), ("layer_scale", (3, 4), "scale"), ("x", (1, 8, 1), "other"),
        ("upscale.weight", (3, 4), "linear"), ("scales.0.weight", (3, 4), "linear"),
        ("fc.weight.absmax", (3, 4), "scale"),
        ("conv.weight", (8, 1, 3), "conv"), ("bn.running_var", (8,), "buffer"),
    ],
)  # fmt: skip
def test_names(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert describe(name, Slot(torch.float32, shape, 0, 0)).kind == kind


def test_the_file_of_the_test_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_file(FILE, tmp_path / "w.safetensors")
    assert set(load_file(tmp_path / "w.safetensors")) == set(FILE)
