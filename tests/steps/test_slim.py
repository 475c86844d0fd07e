"""Slim: units are really gone, the rest computes what it did, budgets are hit, undo and files work."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from solved import solved
from tiny import tiny
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.history import undo
from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError, TaskError
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.output_comparison import zero
from tersor.model.task import Task
from tersor.steps import Entropy, Finetune, Fold, Prune, Quantize, Slim
from tersor.steps.unit_ranking import BY

CLASSES = 4


class Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(width, inner, 3, padding=1, bias=False),
            nn.Conv2d(inner, width, 3, padding=1),
        )
        self.na, self.nb = nn.BatchNorm2d(inner), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.nb(self.b(F.relu(self.na(self.a(x))))))


class Residual(nn.Module):
    """A stream of 12 channels with two blocks, and a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.blocks = nn.Sequential(Block(12, 16), Block(12, 10))
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 2, 6, 6]
        return self.head(self.deep(self.blocks(F.relu(self.norm(self.stem(x))))).mean((2, 3)))


class Heads(nn.Module):
    """Attention of 6 heads with its own integers, a feed-forward layer; LayerNorm counts channels."""

    def __init__(self, fixed: bool = False):
        super().__init__()
        self.heads, self.width, self.fixed = 6, 24, fixed
        self.norm, self.qkv, self.out = nn.LayerNorm(24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 5, 24]
        b, t, _ = x.shape
        shape = (b, t, 3, 6, 4) if self.fixed else (b, t, 3, self.heads, self.width // self.heads)
        q, k, v = self.qkv(self.norm(x)).view(shape).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        x = x + self.out(seen)
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


INPUTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "residual": (Residual, (2, 6, 6)),
    "heads": (Heads, (5, 24)),
}


def given(name: str) -> tuple[nn.Module, Task]:
    return solved(name, *INPUTS[name], 32)


def answers(model: nn.Module, task: Task) -> Tensor:
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return torch.cat([model(x.double()) for x, _ in task.batches("evaluate")])


def kinds(result: State, kind: str) -> list[str]:
    return [entry.text for entry in result.ledger.entries if entry.kind == kind]


def budget(result: State) -> Any:
    (note,) = (entry for entry in result.ledger.entries if entry.kind == "budget")
    return note.data


def macs(model: nn.Module, task: Task) -> int:
    """Multiply-accumulates of one batch, by hooks."""
    total = 0

    def conv(module: Any, args: Any, out: Tensor) -> None:
        nonlocal total
        total += out.numel() * module.weight[0].numel()

    def linear(module: Any, args: Any, out: Tensor) -> None:
        nonlocal total
        total += out.numel() * module.in_features

    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(conv if isinstance(module, nn.Conv2d) else linear)
    with torch.no_grad():
        model(next(iter(task.batches("evaluate")))[0][:1])
    return total


@pytest.mark.sampled
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("name", INPUTS)
def test_what_is_left_computes_what_zeros_would(name: str, by: str) -> None:
    """Independent of the proof: zeros in every slice that the ledger says is gone, in the given model."""
    model, task = given(name)
    result = run(model, Slim(keep=0.6, of="parameters", by=by, correct=False), task)
    masked = copy.deepcopy(model).double()
    for site, axes in result.kept.items():
        if result.sites[site].kind != "buffer":
            for axis, kept in axes.items():
                gone = sorted(set(range(result.sites[site].shape[axis])) - set(kept))
                zero(masked, site, axis, gone)
    slim = result.model()
    assert type(slim) is type(model)
    assert torch.allclose(answers(slim, task), answers(masked, task), rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in slim.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())


@pytest.mark.sampled
@pytest.mark.parametrize("per", ["global", "family"])
@pytest.mark.parametrize("keep", [0.8, 0.5, 0.3])
def test_the_budget_is_what_the_cut_model_costs(keep: float, per: str) -> None:
    model, task = given("residual")
    result = run(model, Slim(keep=keep, per=per, by="l2", correct=False, unmet="nearest"), task)
    share = macs(result.model(), task) / macs(model, task)
    assert share == pytest.approx(budget(result)["after"] / budget(result)["before"], rel=1e-9)
    assert keep * 0.8 <= share <= keep * 1.001  # families of ten units are coarse


def test_each_family_keeps_a_multiple() -> None:
    model, task = given("residual")
    slim = run(model, Slim(keep=0.6, multiple=4, by="l2", correct=False), task).model()
    widths = {slim.stem.out_channels, slim.blocks[0].a.out_channels, slim.blocks[1].a.out_channels}
    assert all(width % 4 == 0 or width == 10 for width in widths)
    assert widths != {12, 16, 10}


def copied(block: Any, count: int, at: int) -> None:
    """Make the units from `at` on copies of the first `count`, in turn."""
    with torch.no_grad():
        for layer in (block.a, block.na):
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.ndim:
                    for place in range(at, len(tensor)):
                        tensor[place] = tensor[(place - at) % count]


def test_refitting_brings_back_what_the_cut_lost() -> None:
    """Half the units of a layer copy the other half, so nothing need be lost."""
    model, task = given("residual")
    copied(model.blocks[0], 8, 8)
    where = "blocks.0.a.*"
    wanted = answers(model, task)
    cut = run(model, Slim(keep=0.51, of="units", where=where, correct=False), task)
    fixed = run(model, Slim(keep=0.51, of="units", where=where), task)
    assert fixed.model().blocks[0].a.out_channels == 8
    lost, rest = ((answers(r.model(), task) - wanted).norm() / wanted.norm() for r in (cut, fixed))
    assert rest < 0.02
    assert lost > 0.1


def test_redundancy_spares_what_cannot_be_rebuilt() -> None:
    """One of a pair of equal units goes, whatever its size; single ones stay."""
    model, task = given("residual")
    copied(model.blocks[0], 3, 13)
    result = run(model, Slim(keep=13 / 16, of="units", where="blocks.0.a.*", correct=False), task)
    gone = set(range(16)) - set(result.kept["blocks.0.a.weight"][0])
    assert {at % 13 for at in gone} == {0, 1, 2}


def test_redundancy_leaves_two_of_units_that_are_all_alike() -> None:
    """Copies of one unit rebuild each other, down to as many as have to stay; no other unit goes for them."""
    model, task = given("residual")
    copied(model.blocks[0], 1, 1)
    wanted = answers(model, task)
    result = run(model, Slim(keep=12 / 26, of="units", where="blocks.*.a.*"), task)
    assert len(result.kept["blocks.0.a.weight"][0]) == 2
    assert "blocks.1.a.weight" not in result.kept
    assert float((answers(result.model(), task) - wanted).norm() / wanted.norm()) < 0.01


def test_heads_and_their_integers() -> None:
    model, task = given("heads")
    result = run(model, Slim(keep=0.5, of="units", per="family", by="l2", correct=False), task)
    slim: Any = result.model()
    assert (slim.heads, slim.qkv.out_features, slim.out.in_features, slim.up.out_features) == (3, 36, 12, 20)
    assert slim.width // slim.heads == 4
    assert slim.norm.normalized_shape == (24,), "LayerNorm counts its channels: not in exact mode"


@pytest.mark.parametrize(("multiple", "heads"), [(1, 3), (4, 3), (8, 2), (16, 4), (24, 6)])
def test_a_multiple_is_of_channels_and_a_head_has_several(multiple: int, heads: int) -> None:
    """Of 6 heads 4 wide, half is asked: 12 channels."""
    model, task = given("heads")
    step = Slim(
        keep=0.5, of="units", per="family", by="l2", correct=False, multiple=multiple, unmet="nearest",
        where="qkv*",
    )  # fmt: skip
    slim: Any = run(model, step, task).model()
    assert (slim.heads, slim.out.in_features) == (heads, 4 * heads)


def test_counted_units_go_only_when_asked() -> None:
    model, task = given("heads")
    exact = run(model, Slim(keep=0.7, of="parameters", by="l2"), task).model()
    every = run(model, Slim(keep=0.4, of="parameters", by="l2", exact=False), task)
    assert exact.norm.normalized_shape == (24,)
    slim: Any = every.model()
    assert slim.norm.normalized_shape[0] == 24, "the stream is an input of the model, so it stays"


def test_code_with_numbers_in_it_keeps_its_heads() -> None:
    _, task = given("heads")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Heads(fixed=True).eval()
    result = run(model, Slim(keep=0.8, of="parameters", by="l2", correct=False), task)
    slim: Any = result.model()
    assert (slim.heads, slim.qkv.out_features) == (6, 72)
    assert slim.up.out_features < 40


def test_a_budget_that_cannot_be_met_names_the_nearest() -> None:
    model, task = given("residual")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RefusedError, match=r"The nearest that can be had keeps .*: give keep=0\.\d+.*for these reasons"
    ):
        run(model, Slim(keep=0.001, of="parameters"), task)
    near = run(model, Slim(keep=0.001, of="parameters", unmet="nearest", by="l2"), task)
    assert near.model().stem.out_channels == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_to_cut_says_why() -> None:
    _, task = given("heads")
    model = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.Flatten(), nn.Linear(120, CLASSES)).eval()
    with pytest.raises(RefusedError, match="layer_norm counts it.*exact=false also cuts"):
        run(model, Slim(), task)


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(24, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mean(1)) if x.sum() > 0 else -self.fc(x.mean(1))

    _, task = given("heads")
    with pytest.raises(RefusedError, match="torch.export cannot trace the model"):
        run(Branches().eval(), Slim(), task)


def test_where_picks_the_layers_that_make_units() -> None:
    model, task = given("residual")
    slim: Any = run(model, Slim(keep=0.5, of="units", where="blocks.1.a.*", by="l2"), task).model()
    assert (slim.blocks[0].a.out_channels, slim.blocks[1].a.out_channels, slim.stem.out_channels) == (
        16,
        5,
        12,
    )
    kept: Any = run(model, Slim(keep=0.5, of="units", where="*,!stem.*", by="l2"), task).model()
    assert kept.stem.out_channels == 12, "the stream is made by the stem too"


def test_rounds_train_in_between() -> None:
    model, task = given("residual")
    result = run(model, Slim(keep=0.4, rounds=2, epochs=1, by="l2", lr=0.001, teacher_weight=0.5), task)
    assert len(kinds(result, "trained")) == 2
    shares = [
        entry.data["after"] / entry.data["before"]
        for entry in result.ledger.entries
        if entry.kind == "budget"
    ]
    assert shares[0] == pytest.approx(0.4**0.5, abs=0.08)
    assert shares[1] == pytest.approx(0.4, abs=0.08)


@pytest.mark.wide
def test_undo_file_and_a_second_cut(tmp_path: Path) -> None:
    model, task = given("residual")
    result = run(model, Slim(keep=0.6, by="l2"), task, journal=tmp_path / "journal")
    assert undo(result).digest == undo(result, 1, journal=tmp_path / "journal").digest
    back = undo(result).model().state_dict()
    assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())
    save(result, tmp_path / "slim.tersor")
    read = load(tmp_path / "slim.tersor")
    with torch.random.fork_rng(devices=[]):
        fresh = read.model(Residual().eval())
    assert torch.equal(answers(fresh, task), answers(result.model(), task))
    again = run(result, Slim(keep=0.6, by="l2"), task)
    assert macs(again.model(), task) == pytest.approx(0.36 * macs(model, task), rel=0.2)
    fresh.train()
    F.cross_entropy(
        fresh(next(iter(task.batches("train")))[0]), torch.zeros(32, dtype=torch.int64)
    ).backward()
    assert fresh.stem.weight.grad is not None


CHAINS = {
    "quantized after": [Slim(keep=0.6, by="l2"), Quantize(bits=8), Entropy()],
    "quantized before": [Quantize(bits=8), Slim(keep=0.6, by="l2"), Entropy()],
    "pruned before": [Prune(keep=0.3), Slim(keep=0.6, by="l2"), Entropy()],
    "coded before": [Entropy(), Slim(keep=0.6, by="l2")],
    "trained after": [Slim(keep=0.6, by="l2"), Finetune(epochs=1, lr=1e-4), Prune(keep=0.5)],
}


@pytest.mark.wide
@pytest.mark.parametrize("steps", CHAINS.values(), ids=CHAINS)
def test_it_composes(steps: list[Any], tmp_path: Path) -> None:
    model, task = given("residual")
    result = run(model, steps, task)
    assert macs(result.model(), task) < 0.65 * macs(model, task)
    save(result, tmp_path / "m.tersor")
    fresh = load(tmp_path / "m.tersor").model(Residual().eval())
    assert torch.equal(answers(fresh, task), answers(result.model(), task))


@pytest.mark.wide
def test_a_killed_run_decides_the_same(tmp_path: Path) -> None:
    """Groups in the journal are applied from it; the rest is computed again."""
    model, task = given("residual")
    step = Slim(keep=0.5, by="l2", epochs=1, lr=1e-3, rounds=2)
    whole = run(model, step, task, journal=tmp_path / "a")
    run(model, step, task, journal=tmp_path / "b")
    groups = sorted((tmp_path / "b").glob("*.group"))
    assert len(groups) > 5
    for path in groups[3:]:
        path.unlink()
    assert run(model, step, task, journal=tmp_path / "b", resume=True).digest == whole.digest


def test_multihead_attention_of_torch() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(24, 6, 40, batch_first=True, dropout=0.0)
            self.head = nn.Linear(24, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(1))

    _, task = given("heads")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Encoder().eval()
    slim: Any = run(model, Slim(keep=0.5, of="units", per="family", by="l2"), task).model()
    assert (slim.layer.self_attn.num_heads, slim.layer.self_attn.head_dim) == (3, 4)
    assert slim.layer.linear1.out_features == 20


def test_a_half_trained_net_of_the_contract_suite_keeps_its_class() -> None:
    t = tiny("lstm")
    slim: Any = run(t.model, Slim(keep=0.5, by="l2"), t.task).model()
    assert slim.cell.hidden_size < 5
    assert slim.head.in_features == 2 * slim.cell.hidden_size


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"keep": 1.0}, "keep=1.0"), ({"keep": 0.0}, "keep=0.0"), ({"of": "flops"}, "of='flops'"),
        ({"by": "l3"}, "by='l3'"), ({"multiple": 0}, "multiple=0"), ({"rounds": 2}, "rounds=2 has no effect"),
        ({"threads": 2}, "threads=2 has no effect"), ({"unmet": "maybe"}, "unmet='maybe'"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        Slim(**settings)


@pytest.mark.wide
def test_the_same_run_twice_is_the_same() -> None:
    model, task = given("residual")
    step = Slim(keep=0.5)
    assert run(model, step, task).ledger.digest == run(model, step, task).ledger.digest
    assert dataclasses.replace(step, by="random") != step


class Detector(nn.Module):
    """A list of images in, a list of dicts out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.deep, self.box = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        h = self.deep(self.body(torch.stack(images)).relu()).relu().mean((2, 3))
        return [{"boxes": box} for box in self.box(h)]


class OneWay(nn.Module):
    """Attention whose stream is not added to its output, a constant, a weight of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.w = nn.Linear(24, 16), nn.Parameter(torch.randn(12, 16) * 0.3)
        self.seen, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tril(torch.ones(5, 5)) @ self.up(x)
        return self.head(F.linear(self.seen(x, x, x, need_weights=False)[0], self.w).relu().mean(1))


class Halves(nn.Module):
    """One attribute names the size of both parts of a split."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.a, self.p = width, nn.Linear(24, 2 * width), nn.Linear(width, width)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.a(x.mean(1)).split([self.width, self.width], 1)
        return self.head(torch.cat([u, self.p(v)], 1).relu())


class Auxiliary(nn.Module):
    """A head that only training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.head = nn.Linear(24, 16), nn.Linear(16, 3), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x.mean(1)).relu()
        return (self.head(h), self.aux(h)) if self.training else self.head(h)


@pytest.mark.parametrize(
    "make",
    [OneWay, lambda: Halves(32), lambda: Halves(48), Auxiliary],
    ids=["one way", "32", "48", "auxiliary"],
)
def test_models_that_were_refused_or_crashed(make: Any) -> None:
    _, task = given("heads")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = make().eval()
    result = run(model, Slim(keep=0.6, of="parameters", by="l2"), task)
    slim = result.model()
    assert type(slim) is type(model)
    assert sum(p.numel() for p in slim.parameters()) <= 0.61 * sum(p.numel() for p in model.parameters())
    slim.train()(torch.randn(2, 5, 24))


def test_a_list_of_images_is_a_batch() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, images = Detector().eval(), [torch.randn(3, 8, 8) for _ in range(6)]
    batches = [(images, [{"boxes": torch.zeros(4)} for _ in images])]
    task = Task(
        "boxes", evaluate=batches, calibrate=batches, feed=lambda net, batch: net(batch[0]),
        metric=lambda output, target: -torch.stack([o["boxes"].square().mean() for o in output]),
    )  # fmt: skip
    slim: Any = run(model, Slim(keep=0.5), task).model()
    assert slim.body.out_channels < 8


def test_a_batch_of_one_value_and_a_batch_of_another_shape() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(8, dtype=torch.int64)
    last = [(x, y), (x[:1], y[:1])]
    slim: Any = run(model, Slim(), Task("t", evaluate=last, calibrate=last)).model()
    assert slim[0].out_features < 16
    wrong = [(x, y), (torch.randn(4, 5), y[:4])]
    with pytest.raises(TaskError, match="batches do not fit the model"):
        run(model, Slim(), Task("t", evaluate=last, calibrate=wrong))


def test_a_tied_weight_is_not_refitted_for_one_of_its_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.embed, self.f = (
                nn.Linear(12, 30, bias=False),
                nn.Embedding(30, 12),
                nn.Linear(12, 12),
            )
            self.embed.weight = self.head.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.head(h + self.f(h).relu()).mean(1)

    random = torch.Generator().manual_seed(1)
    batches = [(torch.randint(0, 30, (64, 7), generator=random), torch.zeros(64, dtype=torch.int64))]
    task = Task("tied", evaluate=batches, calibrate=batches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Tied().eval()
    step = Slim(keep=0.7, by="l2", unmet="nearest")
    apart = []
    for correct in (False, True):
        net = run(model, dataclasses.replace(step, correct=correct), task).model()
        with torch.no_grad():
            apart.append(float((net(batches[0][0]) - model(batches[0][0])).norm()))
    assert apart[1] <= apart[0]


def test_where_that_names_only_some_makers_says_so() -> None:
    model, task = given("residual")
    with pytest.raises(RefusedError, match="where leaves out layers that make the same units"):
        run(model, Slim(where="stem.*"), task)


class Borrowed(nn.Module):
    """A layer whose weight is read, and whose bias is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(24, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.a(x.mean(1)).relu(), self.b.weight).relu())


def test_a_bias_that_nothing_reads_keeps_its_layer_whole() -> None:
    _, task = given("heads")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Borrowed().eval()
    slim: Any = run(model, Slim(keep=0.8, of="parameters", by="l2"), task).model()
    assert slim.a.out_features < 16
    assert slim.b.bias.shape == (16,)


def test_fold_leaves_what_only_training_reads() -> None:
    _, task = given("heads")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Auxiliary().eval()
    with torch.no_grad():
        model.head.weight[:, :8] = 0
    folded = run(model, Fold(), task).model().train()
    x = torch.randn(3, 5, 24)
    for now, was in zip(folded(x), copy.deepcopy(model).train()(x), strict=True):
        assert torch.equal(now, was)


def test_rounds_share_one_latency_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round is asked for what is left of the first model's time: here time is the number of weights."""

    def ms(self: Any, net: nn.Module) -> tuple[float, float]:
        now, cut = (sum(p.numel() for p in m.parameters()) for m in (self.own.build({}, ()), net))
        return float(now), cut / now

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("tersor.steps.slim_latency.Latency.against", ms)
    monkeypatch.setattr("tersor.steps.slim_latency.Latency.time", lambda self, make, i, o: i * o)
    model, task = given("heads")
    step = Slim(keep=0.5, of="latency", by="l2", rounds=2, epochs=1, lr=1e-4, unmet="nearest")
    slim = run(model, step, task).model()
    share = sum(p.numel() for p in slim.parameters()) / sum(p.numel() for p in model.parameters())
    assert share == pytest.approx(0.5, abs=0.08)


def test_it_says_on_which_batches_it_refits() -> None:
    """Without calibration batches, only the evaluation batches are left, which then judge too well."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    batches = [(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(20).long())]
    for calibrate, says in ((batches, "on calibration batches"), (None, r"Give Task(calibrate=...)")):
        task = Task("t", evaluate=batches, calibrate=calibrate)
        (note,) = run(net, Slim(by="l2"), task).ledger.notes("corrected")
        assert says in note.text


class Wrapper(nn.Module):
    """In training mode, as made, around a net that was loaded for inference."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("frozen", ["nothing", "all", "statistics", "biases"])
def test_weights_in_eval_mode_are_refitted(frozen: str) -> None:
    """eval() freezes statistics, and requires_grad=False of all tensors says that the model is in use."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Flatten(), nn.Linear(32, 4),
        ).eval()  # fmt: skip
        batches = [(torch.rand(24, 3, 6, 6),) for _ in range(3)]
    model = Wrapper(net)
    if frozen == "statistics":
        model.train()
        net[3].eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen != "all" and not (frozen == "biases" and name.endswith("bias")))
    task = Task("t", calibrate=batches, evaluate=[(batches[0][0], torch.zeros(24).long())])
    step = {"keep": 0.6, "by": "l2", "per": "family"}
    plain, fitted = (run(model, Slim(correct=c, **step), task) for c in (False, True))
    (note,) = fitted.ledger.notes("corrected")
    assert note.text.startswith("2 layers refitted")
    with torch.no_grad():
        want, cut, near = (
            m.eval()(batches[1][0]) for m in (copy.deepcopy(model), plain.model(), fitted.model())
        )
    assert (near - want).norm() < 0.5 * (cut - want).norm()
    if frozen != "nothing":
        same = {"statistics": "net.3.running_mean", "biases": "net.6.bias", "all": "net.0.weight"}[frozen]
        assert torch.equal(plain.state_dict()[same], fitted.state_dict()[same])
