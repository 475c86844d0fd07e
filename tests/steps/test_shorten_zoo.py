"""Shorten on architectures of torchvision, timm, transformers: all that is removed computes what it computes
with zeros in the last layer of each branch, set by hand; the file loads into a fresh model of the class."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.run import run
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.task import Task
from tersor.steps import Shorten

pytestmark = [pytest.mark.extra, pytest.mark.filterwarnings("ignore")]
WORDS, WIDTH = 50, 32


def images(size: int) -> Task:
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Task("images", evaluate=[(x[:2], torch.zeros(2).long()), (x[2:], torch.zeros(2).long())])


def texts() -> Task:
    ids = torch.randint(WORDS, (4, 7), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": some, "attention_mask": torch.ones_like(some)} for some in (ids[:2], ids[2:])]
    return Task("texts", evaluate=batches, metric=lambda out, batch: torch.zeros(len(batch["input_ids"])))


def vision(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("torchvision").models, name)(num_classes=5, **settings)


def timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=5, **settings)


def transformer(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = pytest.importorskip("transformers")
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        return getattr(library, name)(getattr(library, config)(vocab_size=WORDS, **ends, **settings))

    return make


SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
# model, task, last layer of the first and the second branch of a block, number of branches
Case = tuple[Callable[[], nn.Module], Callable[[], Task], tuple[str, ...], int]
CASES: dict[str, Case] = {
    "resnet18": (vision("resnet18"), lambda: images(32), ("bn2",), 5),
    "mobilenet_v2": (vision("mobilenet_v2", width_mult=0.5), lambda: images(32), ("conv.3",), 10),
    "vit_b": (
        vision("VisionTransformer", image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=WIDTH,
               mlp_dim=48),
        lambda: images(32), ("self_attention.out_proj", "mlp.3"), 4,
    ),
    "vit_tiny": (
        timm("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=8), lambda: images(32),
        ("attn.proj", "mlp.fc2"), 4,
    ),
    "swin": (
        timm("swin_tiny_patch4_window7_224", depths=(2, 2), embed_dim=24, num_heads=(3, 6), img_size=56),
        lambda: images(56), ("attn.proj", "mlp.fc2"), 8,
    ),
    "convnext": (timm("convnext_atto", depths=(1, 1, 2, 1)), lambda: images(64), ("mlp.fc2",), 5),
    "bert": (transformer("BertModel", "BertConfig", **SMALL), texts, ("dense",), 4),
    "gpt2": (
        transformer("GPT2LMHeadModel", "GPT2Config", n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16,
                    use_cache=False),
        texts, ("attn.c_proj", "mlp.c_proj"), 4,
    ),
    "llama": (
        transformer("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, use_cache=False, **SMALL),
        texts, ("self_attn.o_proj", "mlp.down_proj"), 4,
    ),
}  # fmt: skip


def made(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CASES[name][0]().eval()
        for key, value in model.named_parameters():  # no zeros from the start, and statistics of some kind
            if value.ndim == 1:
                value.data.uniform_(0.5, 1.5) if key.endswith("weight") else value.data.normal_(0, 0.3)
        for layer in ("heads.head", "head.fc", "head"):
            if layer in dict(model.named_modules()) and isinstance(model.get_submodule(layer), nn.Linear):
                model.get_submodule(layer).weight.data.normal_(0, 0.3)  # type: ignore[operator, union-attr]
    return model


def answers(model: nn.Module, task: Task) -> Tensor:
    model = copy.deepcopy(model).double().eval()

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    found = []
    with torch.no_grad():
        for batch in task.batches("evaluate"):
            out = model(**batch) if isinstance(batch, dict) else model(wide(batch[0]))
            found.append(out if isinstance(out, Tensor) else out[0])
    return torch.cat(found)


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_model_computes_with_zeros_by_hand(name: str, tmp_path: Path) -> None:
    model, task = made(name), CASES[name][1]()
    result = run(model, Shorten(keep=0.01, of="branches", unmet="nearest", correct=False), task)
    gone = [entry.data["branch"] for entry in result.ledger.entries if entry.kind == "removed"]
    assert len(gone) == CASES[name][3]
    for branch in gone:
        path, _, place = branch.partition("/add:")
        layer: Any = model.get_submodule(f"{path}.{CASES[name][2][int(place)]}")
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor.data.zero_()
    want = answers(model, task)
    torch.testing.assert_close(answers(result.model(), task), want, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(want, answers(made(name), task), rtol=1e-2)
    small = sum(p.numel() for p in result.model().parameters())
    assert small < 0.8 * sum(p.numel() for p in model.parameters())
    save(result, tmp_path / "m.tersor")
    assert torch.equal(
        answers(load(tmp_path / "m.tersor").model(CASES[name][0]()), task), answers(result.model(), task)
    )
