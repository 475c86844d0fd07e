"""Stats: second moments of inputs agree with slow loops over every position of every layer."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core import view as view_module
from tersor.core.state import start
from tersor.core.view import View
from tersor.model import layer_rows
from tersor.model.sites import Site, sites_of
from tersor.model.stats import grams, has_gram
from tersor.model.task import Task
from tersor.record.observer import Observer


def rows_of(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The input vectors of a layer, measured: each input is probed with a unit weight."""
    if isinstance(layer, nn.Linear):
        return list(x.reshape(-1, x.shape[-1]))
    weight = layer.weight
    columns = weight[0].numel()
    probe = type(layer)(
        layer.in_channels, columns, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        bias=False, padding_mode=layer.padding_mode,
    )  # fmt: skip
    # Output channel k of a kernel of unit vectors is input column k at each position.
    with torch.no_grad():
        probe.weight.copy_(torch.eye(columns).reshape(columns, *weight.shape[1:]))
        seen = probe(x)  # [B, I, ...]
    return list(seen.flatten(2).transpose(1, 2).reshape(-1, columns))


def slow_gram(layer: nn.Module, batches: list[Tensor]) -> Tensor:
    rows = [row.double() for x in batches for row in rows_of(layer, x)]
    total = torch.zeros(len(rows[0]), len(rows[0]), dtype=torch.float64)
    for row in rows:
        for i, j in itertools.product(range(len(row)), repeat=2):
            total[i, j] += row[i] * row[j]
    return total / len(rows)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(3, 2), (4, 3)),
    "linear on tokens": (nn.Linear(3, 2), (4, 5, 3)),
    "linear without bias": (nn.Linear(1, 1, bias=False), (4, 1)),
    "conv": (nn.Conv2d(2, 3, 3), (2, 2, 5, 4)),
    "conv 1 x 1": (nn.Conv2d(3, 2, 1), (2, 3, 3, 2)),
    "stride, padding": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2)), (2, 2, 5, 4)),
    "dilation": (nn.Conv2d(1, 2, (2, 3), dilation=(2, 1), padding=1), (2, 1, 5, 4)),
    "same": (nn.Conv2d(2, 2, (2, 3), padding="same", dilation=(3, 2)), (2, 2, 4, 5)),
    "same, even kernel": (nn.Conv2d(1, 1, 4, padding="same"), (2, 1, 4, 5)),
    "valid": (nn.Conv2d(1, 2, 2, padding="valid"), (2, 1, 3, 3)),
    "conv 1-D": (nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), (3, 2, 7)),
    "same 1-D": (nn.Conv1d(2, 3, 4, padding="same"), (3, 2, 5)),
    "reflected border": (nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (2, 1, 4, 4)),
    "circular border": (nn.Conv2d(2, 2, (3, 2), padding=(1, 1), padding_mode="circular"), (2, 2, 4, 3)),
    "replicated border 1-D": (nn.Conv1d(2, 2, 3, padding=2, padding_mode="replicate"), (2, 2, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_gram_is_the_slow_loop(name: str) -> None:
    layer, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(shape, generator=generator) for _ in range(2)]
    task = Task(evaluate=[(x, x) for x in batches], calibrate=batches)
    sites = sites_of(layer)[0]
    found = grams(layer, task, [sites["weight"]])["weight"].moment
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), slow_gram(layer, batches), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_the_gram_is_the_mean_square_of_outputs(name: str) -> None:
    """w^T gram w is the mean square of the outputs of a filter w, computed by the layer itself."""
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    gram = grams(layer, Task(evaluate=[(x, x)], calibrate=[x]), [sites_of(layer)[0]["weight"]])[
        "weight"
    ].moment
    w = layer.weight.detach().flatten(1)  # [O, I]
    with torch.no_grad():
        out = layer(x) - layer(torch.zeros_like(x))  # without the bias
    outs = out.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)  # [O, N]
    torch.testing.assert_close((w @ gram * w).sum(1), outs.square().mean(1), rtol=1e-4, atol=1e-6)


def test_large_images_are_sampled() -> None:
    layer, x = nn.Conv2d(1, 2, 3, padding=1), torch.randn(1, 1, 100, 100)
    seen = layer_rows.input_rows(layer, x)[:, 0]
    assert layer_rows.POSITIONS / 2 < len(seen) <= layer_rows.POSITIONS
    gram = grams(layer, Task(evaluate=[(x, x)], calibrate=[x]), [sites_of(layer)[0]["weight"]])[
        "weight"
    ].moment
    rows = F.unfold(x, 3, padding=1)[0].T
    torch.testing.assert_close(gram, rows.T @ rows / len(rows), rtol=0.2, atol=0.05)


def test_large_images_are_sampled_in_every_column() -> None:
    """Of 64 images 64 wide one in 64 positions counts: every 64th would always be of the first column."""
    layer, x = nn.Conv2d(1, 2, 1), torch.zeros(64, 1, 64, 64)
    x[..., 0] = 1
    task = Task(evaluate=[(x, x)], calibrate=[x])
    gram = grams(layer, task, [sites_of(layer)[0]["weight"]])["weight"].moment
    assert gram.item() == pytest.approx(1 / 64, rel=0.3)


@pytest.mark.parametrize("own", [False, True])
def test_padding_tokens_do_not_count(own: bool) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Product() if own else nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    x, mask = torch.randn(4, 5, 3), torch.ones(4, 5)
    mask[:2, 3:] = 0
    batch = {"x": x, "attention_mask": mask}
    task, model = Task(evaluate=[(batch, mask)], calibrate=[batch]), Reads()
    site = replace(sites_of(model)[0]["layer.weight"], kind="linear")  # a trace says so of one's own class
    found = grams(model, task, [site])["layer.weight"]
    seen = x[mask != 0]
    assert found.samples == len(seen)
    torch.testing.assert_close(found.moment, seen.T @ seen / len(seen), rtol=1e-4, atol=1e-5)


def test_has_gram() -> None:
    sites = sites_of(tiny("mixed").model)[0]
    assert [name for name in sites if has_gram(sites[name]) and name.endswith("weight")] == [
        "point.weight", "line.weight", "head.weight",
    ]  # fmt: skip
    assert not has_gram(sites_of(tiny("attention").model)[0]["embed.weight"])
    assert not has_gram(sites_of(tiny("lstm").model)[0]["cell.weight_ih_l0"])


def view_of(name: str) -> tuple[Any, View]:
    t = tiny(name)
    view = View(start(t.model), t.task, "look", "0", 0, Observer())
    return t, view


def test_a_view_gives_the_gram_of_the_loop() -> None:
    t, view = view_of("conv")
    x = torch.cat([batch[0] for batch in t.task.batches("calibrate")])
    with torch.no_grad():
        after = t.model.norm0(t.model.stem(x)).relu()
    gram = view.gram(view.sites["block.weight"])
    rows = torch.stack(rows_of(t.model.block, after))
    torch.testing.assert_close(gram, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert view.gram(view.sites["stem.weight"]).shape == (9, 9)


def test_layers_are_processed_in_chunks_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less memory means more passes over the data and the same numbers."""
    _, whole = view_of("conv")
    want = {name: whole.gram(whole.sites[name]) for name in ("stem.weight", "block.weight", "head.weight")}
    passes: list[int] = []
    monkeypatch.setattr(view_module, "GRAM_BYTES", 4 * 9 * 9)

    def counted(model: nn.Module, task: Task, sites: list[Site]) -> dict[str, Tensor]:
        passes.append(len(sites))
        return grams(model, task, sites)

    monkeypatch.setattr(view_module, "grams", counted)
    _, tight = view_of("conv")
    for name, gram in want.items():
        assert torch.equal(tight.gram(tight.sites[name]), gram)
    assert passes == [1, 1, 1]


def test_a_layer_that_is_never_called_has_no_gram() -> None:
    """MultiheadAttention passes its out_proj's weight to a function and never calls the layer."""
    _, view = view_of("attention")
    assert view.gram(view.sites["multi.out_proj.weight"]) is None
    assert view.gram(view.sites["embed.weight"]) is None
    assert view.gram(view.sites["qkv.weight"]).shape == (8, 8)


def test_a_layer_called_with_keyword_arguments() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x)

    x = torch.randn(4, 3)
    gram = grams(Named(), Task(evaluate=[(x, x)], calibrate=[x]), [sites_of(Named())[0]["inner.weight"]])
    torch.testing.assert_close(gram["inner.weight"].moment, x.T @ x / 4)


def test_looking_leaves_no_trace() -> None:
    t, view = view_of("conv")
    t.model.train()
    state = torch.get_rng_state()
    model = view.model().train()
    grams(model, t.task, [view.sites["block.weight"]])
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.norm0.running_mean, t.model.norm0.running_mean)
