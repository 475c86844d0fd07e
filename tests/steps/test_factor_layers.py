"""Factors as layers: fewer numbers and operations, the function of the product, and what stays one layer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tersor
from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError
from tersor.model.task import Task
from tersor.steps import Entropy, Export, Factorize, Finetune, Measure, Quantize, Slim

METHODS = ("svd", "tucker", "cp", "spatial", "tt")


class Net(nn.Module):
    """Kernels of several shapes, a stride, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 24, (3, 5), stride=(2, 1), padding=(1, 2), bias=False)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.point, self.head = nn.Conv2d(24, 32, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.point(self.deep(self.wide(x).relu())).relu().mean((2, 3)))


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Net().eval()


def task() -> Task:
    rng = torch.Generator().manual_seed(3)
    batches = [
        (torch.randn(8, 3, 10, 10, generator=rng), torch.randint(10, (8,), generator=rng)) for _ in range(3)
    ]
    return Task("random", train=batches, calibrate=batches, evaluate=batches)


def x() -> Tensor:
    return torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(9))


def products(model: nn.Module, step: Factorize, on: Task) -> nn.Module:
    """The model with the products that the layers are made of as its weights, without layers of their own."""
    result = run(model, step, on)
    twin = copy.deepcopy(model)
    for site, form in products_of(result).items():
        twin.get_parameter(site).data = form
    return twin


def products_of(result: State) -> dict[str, Tensor]:
    """{site: the kernel that its convolutions compute}, by feeding them unit impulses of their channels."""
    found = {}
    model = result.model()
    for entry in result.ledger.notes("done"):
        layers = model.get_submodule(entry.site.removesuffix("weight").removesuffix("."))
        assert isinstance(layers, nn.Sequential)
        whole: Tensor | None = None
        for layer in (part for part in layers.modules() if not list(part.children())):
            # Strides and paddings are left out: kernels are multiplied.
            w = layer.weight.detach().double()
            if w.ndim > 2 and layer.groups > 1:
                w = torch.stack(
                    [torch.eye(len(w)).double()[:, r][:, None, None] * w[r, 0] for r in range(len(w))], 1
                )
            if whole is None:
                whole = w
            elif w.ndim == 2:
                whole = w @ whole
            else:  # [O, R, a, b] after [R, I, c, d]: one is 1 x 1, or one is a column and one a row
                whole = torch.einsum("orab,ricd->oiacbd", w, whole)
                o, i, a, c, b, d = whole.shape
                assert 1 in (a, c)
                assert 1 in (b, d)
                whole = whole.reshape(o, i, a * c, b * d)
        assert whole is not None
        found[entry.site] = whole.float()
    return found


@pytest.mark.sampled
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0.4, "per": "tensor"}, {"rank": 4}, {"energy": 0.8},
        {"keep": 0.6, "multiple": 4, "per": "tensor"}, {"keep": 0.5},
    ],
)  # fmt: skip
def test_the_layers_compute_the_product(method: str, settings: dict[str, Any]) -> None:
    model, on = net(), task()
    step = Factorize(layers=True, method=method, **settings)
    result = run(model, step, on)
    split, twin = result.model().eval(), products(model, step, on)
    all_of_them = "per" in settings or "rank" in settings
    assert {"wide.weight", "head.weight"} <= set(products_of(result)) or not all_of_them
    with torch.no_grad():
        torch.testing.assert_close(split(x()), twin.eval()(x()), rtol=1e-4, atol=1e-5)
    noted = {entry.site: entry.data["rank"] for entry in result.ledger.notes("done")}
    assert all(rank % 4 == 0 for rank in noted.values()) or settings.get("multiple") is None
    count = sum(p.numel() for p in split.parameters())
    assert count < sum(p.numel() for p in model.parameters())
    reasons = {entry.site: entry.text for entry in result.ledger.notes("skipped")}
    alone = "it has 24 groups" in reasons["deep.weight"] or "stores" in reasons["deep.weight"]
    assert alone or "stays whole" in reasons["deep.weight"] and settings == {"keep": 0.5}
    assert type(split.deep) is nn.Conv2d


@pytest.mark.parametrize("method", METHODS)
def test_half_the_parameters_are_kept(method: str) -> None:
    where = "wide.weight,head.weight"
    result = run(net(), Factorize(keep=0.5, per="tensor", layers=True, method=method, where=where), task())
    for layer, before in (("wide", 16 * 24 * 15), ("head", 320)):
        now = sum(
            p.numel()
            for name, p in result.model().get_submodule(layer).named_parameters()
            if "weight" in name
        )
        assert 0.35 * before < now <= 0.5 * before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_layers_share_a_budget(method: str, keep: float) -> None:
    """The outputs are nearer than with the same share for each; no more numbers than asked for."""
    model, on = net(), task()
    weights = [name for name, w in model.named_parameters() if w.ndim > 1 and name != "deep.weight"]
    whole = sum(model.get_parameter(name).numel() for name in weights)
    apart_by = {}
    for per in ("global", "tensor"):
        step = Factorize(keep=keep, per=per, layers=True, method=method, where=tuple(weights), whiten=False)
        split = run(model, step, on).model().eval()
        numbers = sum(w.numel() for name, w in split.named_parameters() if w.ndim > 1 and "deep" not in name)
        assert numbers <= keep * whole
        with torch.no_grad():
            apart_by[per] = float((split(x()) - model(x())).square().mean())
    assert apart_by["global"] <= apart_by["tensor"]


@pytest.mark.parametrize("method", METHODS)
def test_a_share_of_the_multiplications(method: str) -> None:
    """By torch's counter. The wide layer's stride lets Tucker's and CP's first factor meet two positions for
    each of the output."""
    model, on = net(), task()
    result = run(model, Factorize(keep=0.5, of="macs", layers=True, method=method, where="!deep*"), on)
    deep = macs(model) - sum(macs_of_layers(model).values())
    (note,) = result.ledger.notes("ranks")
    assert note.data["of"] == 8 * (macs(model) - deep)  # a batch of the task
    assert note.data["kept"] == 8 * (macs(result.model()) - deep)
    assert note.data["kept"] <= 0.5 * note.data["of"]


@pytest.mark.parametrize("method", METHODS)
def test_a_share_of_the_multiplications_where_nothing_is_padded(method: str) -> None:
    """The first factors meet all positions of the inputs, which are more than those of the outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(8, 16, 5), nn.ReLU(), nn.Conv2d(16, 24, 4, stride=2), nn.Flatten()
        ).eval()
        batch = torch.randn(2, 8, 12, 13)
    on = Task(evaluate=[(batch, batch)], calibrate=[(batch, batch)], metric=nn.functional.mse_loss)
    result = run(model, Factorize(keep=0.5, of="macs", layers=True, method=method), on)
    (note,) = result.ledger.notes("ranks")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result.model().eval()(batch)
    assert note.data["kept"] == counter.get_total_flops() // 2 <= 0.5 * note.data["of"]


def macs(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x()[:1])
    return int(counter.get_total_flops()) // 2


def macs_of_layers(model: Net) -> dict[str, int]:
    """By hand, of the layers that are split: outputs [10, 10], then [5, 10], and one vector."""
    return {
        "first": 100 * 16 * 3 * 9, "wide": 50 * 24 * 16 * 15, "point": 50 * 32 * 24, "head": 320,
    }  # fmt: skip


def test_what_cannot_be_split_leaves_its_budget_to_the_others() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 5, 12), torch.zeros(4, 5, 12)) for _ in range(2)]
    on = Task("own", evaluate=batches, calibrate=batches, loss=nn.functional.mse_loss, metric=apart)
    result = run(Own().eval(), Factorize(keep=0.4, layers=True), on)
    (note,) = result.ledger.notes("ranks")
    assert note.data["of"] == 144  # of the only layer that can be split
    assert [entry.site for entry in result.ledger.notes("done")] == ["called.weight"]


def test_roundings_that_are_too_large_together_leave_some_layers_whole() -> None:
    """In 16 bits products and factors are rounded on their own. Each layer alone adds little."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 24)
            self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            x = self.table(x).sum(1)
            for layer in self.layers:
                x = x + 2e-3 * layer(x)
            return x

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, ids = Residual().bfloat16().eval(), torch.randint(50, (8, 5))
    on = Task(evaluate=[(ids, ids)], calibrate=[(ids, ids)], metric=nn.functional.mse_loss)
    result = run(model, Factorize(keep=0.5, layers=True, where="layers*"), on)
    whole = [entry for entry in result.ledger.notes("skipped") if "with all split, outputs" in entry.text]
    assert whole
    assert 0 < len(result.changes) <= 12 - len(whole)
    assert all("give the model in float32" in entry.text for entry in whole)


@pytest.mark.wide
def test_more_of_the_weight_is_kept_with_more_parameters() -> None:
    """And Tucker's and SVD's error of the outputs is less with the inputs' moment than without it."""
    on, model = task(), net()

    def lost(**settings: Any) -> float:
        split = run(model, Factorize(layers=True, where="wide.weight", **settings), on).model().eval()
        gap = batch = 0.0
        with torch.no_grad():
            for images, _ in on.batches("calibrate"):
                inside = model.norm(model.first(images)).relu()
                gap += float((split.wide(inside) - model.wide(inside)).square().sum())
                batch += 1
        return gap

    for method in METHODS:
        errors = [lost(method=method, keep=keep) for keep in (0.2, 0.4, 0.8)]
        assert errors == sorted(errors, reverse=True)
        if method in ("svd", "tucker", "tt"):
            assert lost(method=method, keep=0.4) < lost(method=method, keep=0.4, whiten=False)


@pytest.mark.sampled(method="svd")
@pytest.mark.parametrize("method", METHODS)
def test_a_file_trains_exports_and_goes_back(method: str, tmp_path: Path) -> None:
    on, step = task(), Factorize(keep=0.5, layers=True, method=method)
    result = run(net(), [step, Finetune(epochs=1), Quantize(bits=8), Entropy(), Measure()], on)
    tersor.save(result, tmp_path / "m.tersor")
    loaded = tersor.load(tmp_path / "m.tersor").model(net()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x()), result.model().eval()(x()))
    assert isinstance(loaded.wide, nn.Sequential)
    run(net(), [step, Export(to="onnxruntime")], on, out=tmp_path)
    assert (tmp_path / "model.onnx").is_file()


def test_slim_cuts_what_factorize_made() -> None:
    on = task()
    split = run(net(), Factorize(keep=0.6, layers=True, method="tucker"), on)
    slim = run(split, Slim(keep=0.6, of="parameters", unmet="nearest"), on)
    before, after = (sum(p.numel() for p in one.model().parameters()) for one in (split, slim))
    assert after < before
    slim.model()(x())


def test_epochs_train_the_layers() -> None:
    on = task()
    step = Factorize(keep=0.3, layers=True, method="tucker", epochs=4, lr=0.01)
    trained, cut = run(net(), step, on), run(net(), Factorize(keep=0.3, layers=True, method="tucker"), on)
    assert {n: tuple(v.shape) for n, v in trained.state_dict().items()} == {
        n: tuple(v.shape) for n, v in cut.state_dict().items()
    }

    def loss(state: State) -> float:
        model = state.model().eval()
        with torch.no_grad():
            return sum(float(nn.functional.cross_entropy(model(a), b)) for a, b in on.batches("train"))

    assert loss(trained) < loss(cut)


def apart(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1)


class Own(nn.Module):
    """Its code reads one weight itself, ties two, and has an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(12, 12), nn.Linear(12, 12)
        self.one, self.two = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.two.weight = self.one.weight
        self.multi = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.read.weight) + self.called(x)
        return self.multi(self.two(self.one(x)), x, x, need_weights=False)[0]


def test_what_cannot_be_split_stays_whole_and_is_named() -> None:
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(3)
    batches = [(torch.randn(4, 5, 12, generator=rng), torch.zeros(4, 5, 12)) for _ in range(2)]
    on = Task("own", evaluate=batches, calibrate=batches, loss=nn.functional.mse_loss, metric=apart)
    model = Own().eval()
    result = run(model, Factorize(rank=3, layers=True), on)
    reasons = {entry.site: entry.text for entry in result.ledger.notes("skipped")}
    assert {"read.weight", "one.weight", "multi.in_proj_weight", "multi.out_proj.weight"} <= set(reasons)
    assert all("it stays one layer: " in reasons[name] for name in ("read.weight", "one.weight"))
    assert [entry.site for entry in result.ledger.notes("done")] == ["called.weight"]
    after = result.model()
    for name, value in model.state_dict().items():
        if not name.startswith("called.weight") and "called" not in name:
            assert torch.equal(after.state_dict()[name], value)
    assert isinstance(after.called, nn.Sequential)


class Single(nn.Sequential):
    """Its code fixes float32, so that no proof in float64 is possible."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_a_model_that_runs_in_float32_alone_is_split() -> None:
    torch.manual_seed(1)
    model = Single(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10)).eval()
    result = run(model, Factorize(keep=0.3, per="tensor", layers=True, method="tucker"), task())
    assert [entry.site for entry in result.ledger.notes("done")] == ["0.weight", "3.weight"]
    assert [type(layer) for layer in result.model()] == [nn.Sequential, nn.ReLU, nn.Flatten, nn.Sequential]


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_a_train_of_four_layers(keep: float) -> None:
    """Also where the model itself is the convolution; a kernel of one axis has no columns and rows."""
    torch.manual_seed(1)
    batch = torch.randn(4, 8, 9, 9)
    on = Task(evaluate=[(batch, batch)], calibrate=[(batch, batch)], metric=nn.functional.mse_loss)
    model = nn.Conv2d(8, 12, 3, stride=2, padding=1).eval()
    result = run(model, Factorize(keep=keep, layers=True, method="tt"), on)
    after = result.model().eval()
    parts = [part for part in after.modules() if isinstance(part, nn.Conv2d)]
    assert [part.kernel_size for part in parts] == [(1, 1), (3, 1), (1, 3), (1, 1)]
    assert [part.stride for part in parts] == [(1, 1), (2, 1), (1, 2), (1, 1)]
    assert sum(part.weight.numel() for part in parts) <= keep * model.weight.numel()
    twin = copy.deepcopy(model)
    twin.weight.data = products_of(result)["weight"]
    with torch.no_grad():
        torch.testing.assert_close(after(batch), twin(batch), rtol=1e-4, atol=1e-5)
    line = nn.Sequential(nn.Conv1d(8, 12, 5), nn.Flatten()).eval()
    on = Task(
        evaluate=[(batch[:, :, 0],) * 2], calibrate=[(batch[:, :, 0],) * 2], metric=nn.functional.mse_loss
    )
    split = run(line, Factorize(keep=keep, layers=True, method="tt"), on).model()
    assert [part.kernel_size for part in split[0]] == [(1,), (5,), (1,)]


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(20, 12), nn.ConvTranspose2d(12, 8, 3, stride=2)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T]
        maps = self.table(tokens).transpose(1, 2).unflatten(2, (2, 2))
        return self.up(maps).flatten(2).mean(2)


@pytest.mark.parametrize("method", METHODS)
def test_transposed_convolutions_and_tables_become_two_layers(method: str) -> None:
    torch.manual_seed(1)
    batch = (torch.randint(20, (6, 4)), torch.randint(8, (6,)))
    on, model = Task("up", evaluate=[batch], calibrate=[batch]), Up().eval()
    result = run(model, Factorize(keep=0.5, per="tensor", layers=True, method=method), on)
    after = result.model().eval()
    assert [entry.site for entry in result.ledger.notes("done")] == ["table.weight", "up.weight"]
    assert [type(layer) for layer in after.up] == [nn.Conv2d, nn.ConvTranspose2d]
    assert [type(layer) for layer in after.table] == [nn.Embedding, nn.Linear]
    with torch.no_grad():
        first, second = (layer.weight for layer in after.up)
        model.up.weight.copy_(torch.einsum("ri,rohw->iohw", first[:, :, 0, 0], second))
        model.table.weight.copy_(after.table[0].weight @ after.table[1].weight.T)
        torch.testing.assert_close(after(batch[0]), model(batch[0]), rtol=1e-4, atol=1e-5)


def test_bad_settings() -> None:
    with pytest.raises(SettingError, match="method='tucker' has no effect if layers=False"):
        Factorize(method="tucker")
    with pytest.raises(SettingError, match="method='tuker'"):
        Factorize(method="tuker", layers=True)
    with pytest.raises(SettingError, match="multiple=0"):
        Factorize(multiple=0)
    with pytest.raises(RefusedError, match="task"):
        run(net(), Factorize(layers=True))
