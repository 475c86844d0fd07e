"""Gradient checkpointing in training: exact gradients, or refused before the first step."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import CheckpointError, checkpoint

from tersor import Finetune, Prune, Quantize, RefusedError, Task, run, trainable
from tersor.core.state import State, start
from tersor.forms import Dense
from tersor.forms.grid import Grid

IDS = torch.randint(0, 30, (4, 6), generator=torch.Generator().manual_seed(3))


class Plain(nn.Module):
    """Checkpoints modules and one part of functions only, with a norm and a bare parameter."""

    def __init__(self, mode: str = ""):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale, self.norm = nn.Parameter(torch.ones(8) * 1.3), nn.LayerNorm(8)
        self.head, self.mode = nn.Linear(8, 30), mode

    def rest(self, x: Tensor) -> Tensor:
        return self.norm((self.b(x).tanh() * self.scale) @ self.a.weight).relu()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1)
        if self.mode and self.training:
            again: dict[str, Any] = {"use_reentrant": self.mode == "reentrant"}
            x = checkpoint(lambda x: self.a(x).tanh(), x, **again)
            return self.head(checkpoint(self.rest, x, **again))
        return self.head(self.rest(self.a(x).tanh()))


def plain(mode: str = "") -> Plain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Plain(mode)


def task_of(target: Tensor) -> Task:
    return Task(evaluate=[(IDS, target)], train=[(IDS, target)])


def grads(module: nn.Module, target: Tensor) -> dict[str, Tensor]:
    """Gradients of the weights that a module computes with, by name."""
    module.zero_grad()
    out = module(IDS)
    out = getattr(out, "logits", out)
    cross_entropy(out.reshape(-1, out.shape[-1]), target.reshape(-1)).backward()
    return {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}


def moved(state: State) -> tuple[Any, dict[str, Tensor]]:
    """A module in training with weights that differ from the given ones, and these weights, decoded."""
    module = trainable(state)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.05)
    return module, {name: value.detach().clone() for name, value in module.values().items()}


def reference(model: nn.Module, values: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
    """Gradients of these weights from plain PyTorch without checkpointing."""
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        for name, own in (*model.named_parameters(), *model.named_buffers()):
            if name in values:
                own.copy_(values[name])
    return grads(model, target)


@pytest.mark.parametrize("steps", [(), (Prune(keep=0.5),)], ids=["dense", "pruned"])
def test_a_plain_model_with_checkpointing_has_exact_gradients(steps: tuple[Any, ...]) -> None:
    target = IDS[:, 0]
    state = run(plain("again"), steps) if steps else run(plain("again"), Prune(keep=1.0))
    module, values = moved(state)
    want = reference(plain(), values, target)
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for _ in range(2):
            found = grads(one, target)
            for name, form in state.forms.items():
                keep = form.keep.decode() if hasattr(form, "keep") else 1
                key = next(key for key in found if key.startswith(f"parts./{name.replace('.', '/')}."))
                torch.testing.assert_close(found[key], want[name] * keep, rtol=1e-5, atol=1e-8)
        if one is module:
            assert not any(p.grad is not None for p in module.net.parameters())


def test_reentry_is_refused_before_the_first_step() -> None:
    target = IDS[:, 0]
    module, _ = moved(run(plain("reentrant"), Prune(keep=0.5)))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(RefusedError, match="Call torch.utils.checkpoint with use_reentrant=False"):
        grads(module, target)
    with pytest.raises(RefusedError, match="use_reentrant=False"):
        run(plain("reentrant"), Finetune(epochs=1), task_of(target))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_the_built_in_loop_trains_to_the_same_weights() -> None:
    target = IDS[:, 0]
    steps = [Quantize(bits=4), Finetune(epochs=6, lr=0.02)]
    found = [run(plain(mode), steps, task_of(target)).digest for mode in ("again", "")]
    assert found[0] == found[1]


# --- Hugging Face ---


def llama(**settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    if settings:
        model.gradient_checkpointing_enable(settings)
    return model


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("late", [False, True], ids=["before", "afterwards"])
def test_a_llama_has_exact_gradients(reentrant: bool, late: bool) -> None:
    """Without Rerun they are wrong by a quarter."""
    settings = {"use_reentrant": reentrant}
    state = run(llama(**({} if late else settings)), Prune(keep=0.5))
    module, values = moved(state)
    if late:
        module.gradient_checkpointing_enable(settings)
    assert module.net.is_gradient_checkpointing
    want, found = reference(llama(), values, IDS), grads(module, IDS)
    for name, form in state.forms.items():
        keep = form.keep.decode() if hasattr(form, "keep") else 1
        key = next(key for key in found if key.startswith(f"parts./{name.replace('.', '/')}."))
        torch.testing.assert_close(found[key], want[name] * keep, rtol=1e-5, atol=1e-8)


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_llama_with_grids_on_edges_has_exact_gradients(reentrant: bool) -> None:
    found = []
    for settings in ({}, {"use_reentrant": reentrant}):
        module = with_grids(llama(**settings), ["model.layers.0/add:1", "model.layers.1.mlp/mul:0"])
        found.append(grads(module, IDS))
    assert sum("grids" in key for key in found[0]) == 2
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-6, atol=1e-9)


def with_grids(model: nn.Module, edges: list[str]) -> nn.Module:
    grid = Grid(Dense(torch.tensor([0.05])), None, 4, True)
    state = replace(start(model), grids=dict.fromkeys(edges, grid))
    return trainable(state, example=lambda net: net(IDS))


@pytest.mark.parametrize("mode", ["again", "reentrant"])
def test_grids_on_edges_of_a_plain_model_with_checkpointing_are_refused(mode: str) -> None:
    """The first of two checks refuses it: ours in the module that runs again, or torch's count of tensors."""
    for edge, error in (("b/linear:0", RefusedError), ("/relu:0", (RefusedError, CheckpointError))):
        module = with_grids(plain(mode), [edge])
        with pytest.raises(error):
            grads(module, IDS[:, 0])


def test_a_grid_in_a_part_without_modules_and_weights_is_refused_with_reentry() -> None:
    """No other check would notice: the part that runs again has no module and no weight."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 30)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens).mean(1)
            return self.head(checkpoint(torch.tanh, x, use_reentrant=True))

    with pytest.raises(RefusedError, match="Train without checkpointing"):
        grads(with_grids(Bare(), ["/tanh:0"]), IDS[:, 0])
