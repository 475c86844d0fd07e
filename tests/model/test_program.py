"""Program: what torch.export makes of a model is a model: the same outputs, nothing fixed by code, stored."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import tersor
from tersor.candidates.candidate import candidate, pair
from tersor.core.history import undo
from tersor.errors import RefusedError, SettingError, TaskError
from tersor.model import program_guards
from tersor.model.program import Program
from tersor.model.program_builder import program_of
from tersor.model.task import Task
from tersor.resolve import resolve_model

AUTO = torch.export.Dim.AUTO


class Halves(nn.Module):
    """Numbers in the code, as in ShuffleNet and Swin: halves, groups to shuffle, heads of a fixed width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.mixed = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 4)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(32, 16)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, images: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
        x = F.relu(self.norm(self.stem(images)))
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.mixed(right)], 1)
        b, _, h, w = x.shape
        x = x.view(b, 2, 8, h, w).transpose(1, 2).reshape(b, 16, h, w)
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).view(b, h * w, 3, 4, 4).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, 16)
        gate, value = self.up(self.out(seen)).view(b, h * w, 2, 32).unbind(2)
        pooled = F.dropout(self.down(gate.sigmoid() * value).mean(1), 0.5, self.training) * self.scale
        return {"logits": self.head(pooled) + (0 if bias is None else bias), "all": (pooled,)}


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))


def net() -> Halves:
    torch.manual_seed(0)
    model = Halves().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.running_var.uniform_(0.5, 1.5)
        model.norm.bias.uniform_(-0.5, 0.5)
    return model


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images(2),), dynamic_shapes=({0: AUTO},), strict=False)


def the_task() -> Task:
    batches = [(images(16), torch.arange(16) % 4)]
    return Task(
        "toy", evaluate=batches, calibrate=batches, train=batches, logits=lambda out: out["logits"],
        loss=lambda out, target: F.cross_entropy(out["logits"], target),
        metric=lambda out, target: (out["logits"].argmax(1) == target).float(),
    )  # fmt: skip


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


@pytest.mark.parametrize("made", ["program", "its module"])
def test_it_computes_what_the_model_does(made: str) -> None:
    model, source = net(), exported(net())
    one = program_of(source if made == "program" else source.module())
    for count in (1, 2, 5):
        x = images(count)
        assert same(one(x), model(x))
        assert same(one(images=x), model(x))
        assert same(copy.deepcopy(one)(x), model(x))
        assert same(pickle.loads(pickle.dumps(one))(x), model(x))
    assert one(images(3)).keys() == {"logits", "all"}
    assert one.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(one.state_dict()[name], value) for name, value in model.state_dict().items())
    kinds = {path: type(part) for path, part in model.named_modules() if path}
    assert {path: type(one.get_submodule(path)) for path in kinds} == kinds


def test_arguments_by_name_stay_by_name() -> None:
    model, given = net(), {"images": images(2), "bias": torch.ones(4)}
    one = program_of(torch.export.export(model, (), given, strict=False))
    assert same(one(**given), model(**given))
    assert same(one(**dict(reversed(given.items()))), model(**given))
    with pytest.raises(TypeError):
        one(images(2))


def test_sizes_that_the_trace_fixed_are_refused() -> None:
    one = program_of(exported(net()))
    assert one.forward.sizes == "images [*, 3, 6, 6]"
    with pytest.raises(TypeError, match=re.escape("exported for images [*, 3, 6, 6] (* may vary)")):
        one(torch.randn(2, 3, 8, 8))
    fixed = program_of(torch.export.export(net(), (images(2),), strict=False))
    with pytest.raises(TypeError, match=re.escape("exported for images [2, 3, 6, 6]")):
        fixed(images(4))


def test_layers_train_and_the_rest_is_as_in_eval_mode() -> None:
    model, one = net(), program_of(exported(net()))
    for each in (model, one):
        each.train()
        torch.manual_seed(3)
        each(images(8))["logits"].square().sum().backward()
    assert torch.equal(one.norm.running_mean, model.norm.running_mean)  # type: ignore[union-attr]
    theirs = dict(one.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(theirs[name].grad, parameter.grad, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.wide
def test_slim_cuts_what_the_code_fixes_and_the_file_continues(tmp_path: Path) -> None:
    model, task = net(), the_task()
    slim = tersor.Slim(keep=0.5, of="parameters", exact=False)
    with pytest.raises(
        RefusedError, match=r"slim: .*the code fixes widths; an exported program.*torch\.export"
    ):
        tersor.run(model, [slim], task)
    source = exported(model)
    result = tersor.run(source, [slim, tersor.Finetune(epochs=1)], task)
    small = result.model()
    assert type(small) is Program
    assert sum(p.numel() for p in small.parameters()) <= 0.51 * sum(p.numel() for p in model.parameters())
    assert small.mixed.groups == 4
    assert small.down.in_features < 32
    note = next(entry.text for entry in result.ledger.entries if entry.kind == "program")
    assert "exported program, for images [*, 3, 6, 6]" in note
    assert same(undo(result).model()(images(3)), model(images(3)))

    tersor.save(result, tmp_path / "small.tersor")
    back = tersor.load(tmp_path / "small.tersor").model(source)
    assert same(back(images(3)), small(images(3)))

    torch.export.save(source, tmp_path / "net.pt2")
    first, second = pair(str(tmp_path / "net.pt2"), str(tmp_path / "small.tersor"))  # a program is the code
    assert same(first.module(images(3)), model(images(3)))
    assert same(second.module(images(3)), small(images(3)))
    with pytest.raises(SettingError, match=r"net\.pt2 is a program and needs no code; leave out --model"):
        candidate(str(tmp_path / "net.pt2"), small)
    words = resolve_model(str(tmp_path / "small.tersor"), arch=str(tmp_path / "net.pt2"))
    assert same(words.model()(images(3)), small(images(3)))

    torch.export.save(exported(small), tmp_path / "small.pt2")
    alone = torch.export.load(tmp_path / "small.pt2").module()
    assert same(alone(images(3)), small(images(3)))
    again = tersor.run(resolve_model(str(tmp_path / "small.pt2"), task=task), [tersor.Entropy()], task)
    assert same(again.model()(images(3)), small(images(3)))


def test_programs_that_no_module_can_be_made_of_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"exported in training mode \(batch_norm\).*eval"):
        program_of(torch.export.export(net().train(), (images(2),), strict=False))

    class Region(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu"):
                return x @ x.T

    with pytest.raises(RefusedError, match="a graph of its own"):
        program_of(torch.export.export(Region(), (torch.randn(3, 3),), strict=False))
    (tmp_path / "broken.pt2").write_bytes(b"PK")
    with pytest.raises(SettingError, match=r"broken\.pt2 cannot be read as an exported program"):
        resolve_model(str(tmp_path / "broken.pt2"))


def test_batches_that_do_not_fit_say_for_what_it_was_exported() -> None:
    source = torch.export.export(net(), (images(2),), strict=False)
    with pytest.raises(TaskError, match=re.escape("exported for images [2, 3, 6, 6]")):
        tersor.run(source, [tersor.Slim(keep=0.5)], the_task())


class Chooses(nn.Module):
    """The code follows sizes and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        y = self.a(x) if x.shape[0] > 4 and x.shape[0] % 2 == 0 else self.b(x)
        return (y if mask is None else y * mask) * (-1 if causal else 1)


@pytest.mark.parametrize("made", ["program", "file", "its module", "pickled", "copied"])
def test_sizes_for_which_the_code_goes_another_way_are_refused(made: str, tmp_path: Path) -> None:
    model, shapes = Chooses().eval(), {"x": {0: AUTO}, "causal": None}
    source = torch.export.export(model, (torch.randn(8, 4), False), dynamic_shapes=shapes)
    if made == "file":
        torch.export.save(source, tmp_path / "net.pt2")
        source = torch.export.load(tmp_path / "net.pt2")
    one = program_of(source.module() if made == "its module" else source)
    if made in ("pickled", "copied"):
        one = pickle.loads(pickle.dumps(one)) if made == "pickled" else copy.deepcopy(one)
    for count in (6, 20):
        assert same(one(torch.ones(count, 4), False), model(torch.ones(count, 4)))
    for count, why in ((4, r"x\.size\(\)\[0\] (> 4|>= [56])"), (7, r"x\.size\(\)\[0\] % 2 == 0")):
        with pytest.raises(TypeError, match=why):
            one(torch.ones(count, 4), False)


def test_ranges_are_kept_where_torch_checks_no_guards() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
            return x + more["y"]

    size = torch.export.Dim("size", min=3, max=9)
    given = (torch.randn(8, 4), {"y": torch.randn(8, 4)})
    source = torch.export.export(Sum(), given, dynamic_shapes=({0: size}, {"y": {0: size}}))
    one = program_of(source.module(check_guards=False))
    assert one(torch.ones(9, 4), {"y": torch.ones(9, 4)}).shape == (9, 4)
    for first, second, why in ((2, 2, ">= 3"), (10, 10, "<= 9"), (8, 1, "==")):
        with pytest.raises(TypeError, match=why):
            one(torch.ones(first, 4), {"y": torch.ones(second, 4)})


def test_constants_other_than_the_traced_are_refused() -> None:
    x = torch.randn(8, 4)
    one = program_of(torch.export.export(Chooses().eval(), (x, False, None)))
    assert one(x, False, None).shape == (8, 4)
    with pytest.raises(TypeError, match=r"exported for x \[8, 4\], causal=False, mask=None"):
        one(x, True, None)
    with pytest.raises(TypeError, match="mask=None"):
        one(x, False, torch.ones(8, 4))


def test_arguments_in_another_order_are_not_called_a_size_error() -> None:
    class First(nn.Module):
        def forward(self, given: dict[str, Tensor]) -> Tensor:
            return next(iter(given.values())) * 1

    one = program_of(torch.export.export(First(), ({"a": torch.ones(2), "b": torch.zeros(2)},)))
    with pytest.raises(TypeError, match="nested and ordered as .*'a': 'given_a', 'b': 'given_b'"):
        one({"b": torch.zeros(2), "a": torch.ones(2)})


class Random(nn.Module):
    """One layer that does another thing in training, between two that do not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(8, 8), layer, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.first(x))
        return self.last((out[0] if isinstance(out, tuple) else out).mean(1))


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)


DROPOUTS: dict[str, Any] = {
    "dropout": lambda: nn.Dropout(0.5),
    "dropout in place": lambda: nn.Dropout(0.5, inplace=True),
    "dropout of channels": lambda: nn.Dropout1d(0.5),
    "alpha dropout": lambda: nn.AlphaDropout(0.5),
    "alpha dropout in place": lambda: nn.AlphaDropout(0.5, inplace=True),
    "alpha dropout of channels": lambda: nn.FeatureAlphaDropout(0.5),
}
OTHERS: dict[str, Any] = {
    "rrelu": nn.RReLU,
    "gru": lambda: nn.GRU(8, 8, 2, dropout=0.5),
    "lstm": lambda: nn.LSTM(8, 8, 2, dropout=0.5),
    "attention": Attends,
    "instance norm": lambda: nn.InstanceNorm1d(8, track_running_stats=True),
    "batch norm without numbers": lambda: nn.BatchNorm1d(8, affine=False),
}


@pytest.mark.parametrize("name", [*DROPOUTS, *OTHERS])
def test_programs_of_training_mode_are_refused(name: str) -> None:
    model = Random({**DROPOUTS, **OTHERS}[name]())
    x = torch.randn(16, 8, 8)
    with pytest.raises(RefusedError, match="exported in training mode"):
        program_of(torch.export.export(model.train(), (x,), strict=False))
    one = program_of(torch.export.export(model.eval(), (x,), strict=False))
    assert torch.allclose(one(x), model(x), atol=1e-6)


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropouts_of_all_kinds_are_random_in_training_as_those_of_the_model(name: str) -> None:
    model, x = Random(DROPOUTS[name]()).eval(), torch.randn(16, 8, 8)
    one = program_of(torch.export.export(model, (x,)))
    assert one.forward.asleep == ()
    outputs = []
    for each in (model, one):
        torch.manual_seed(3)
        outputs.append(each.train()(x))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model.eval()(x))


@pytest.mark.parametrize("name", ["rrelu", "gru", "instance norm"])
def test_the_ledger_names_what_no_longer_differs_in_training(name: str) -> None:
    x = torch.randn(16, 8, 8)
    batches = [(x, torch.arange(16) % 4)]
    task = Task("toy", evaluate=batches, calibrate=batches)
    source = torch.export.export(Random(OTHERS[name]()).eval(), (x,))
    entries = tersor.run(source, [tersor.Measure()], task).ledger.entries
    note = next(entry.text for entry in entries if entry.kind == "program")
    assert f"with {name.replace(' ', '_')}, which may do more when the model trains" in note


def test_dropout_without_a_chance_and_norms_without_statistics_are_of_both_modes() -> None:
    x = torch.randn(16, 8, 8)
    for layer in (nn.Dropout(0.0), nn.InstanceNorm1d(8), nn.GRU(8, 8, 2)):
        model = Random(layer).train()
        one = program_of(torch.export.export(model, (x,), strict=False))
        assert one.forward.asleep == ()
        assert torch.allclose(one(x), model(x), atol=1e-6)


class Called(nn.Module):
    """A function of PyTorch with tensors of these names, as parameters or as buffers."""

    def __init__(self, function: Any, parameters: str = "", buffers: str = "") -> None:
        super().__init__()
        self.function = function
        torch.manual_seed(1)
        for name in parameters.split():
            self.register_parameter(
                name, nn.Parameter(torch.rand(8, 8) if name == "matrix" else torch.rand(8))
            )
        for name in buffers.split():
            self.register_buffer(name, torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self)


def frozen_norm(x: Tensor, m: Any) -> Tensor:
    return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, training=False)


CALLED: dict[str, Any] = {
    "group norm without bias": lambda: Called(lambda x, m: F.group_norm(x, 2, m.weight), "weight"),
    "layer norm without weight": lambda: Called(lambda x, m: F.layer_norm(x, (8,), None, m.bias), "bias"),
    "batch norm without bias": lambda: Called(
        lambda x, m: F.batch_norm(x, m.running_mean, m.running_var, m.weight),
        "weight", "running_mean running_var",
    ),
    "frozen batch norm": lambda: Called(frozen_norm, "", "weight bias running_mean running_var"),
    "layer norm of buffers": lambda: Called(
        lambda x, m: F.layer_norm(x, (8,), m.weight, m.bias), "", "weight bias"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLED)
def test_calls_that_no_layer_makes_stay_operators(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), CALLED[name](), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(16, 8)
    batches = [(x, torch.arange(16) % 4)]
    task = Task("toy", evaluate=batches, calibrate=batches, train=batches)
    source = torch.export.export(model, (x,))
    one = program_of(source)
    assert same(one(x), model(x))
    assert set(dict(one.named_buffers())) == set(dict(model.named_buffers()))
    result = tersor.run(source, [tersor.Slim(keep=0.5, unmet="nearest"), tersor.Finetune(epochs=2)], task)
    after = dict(result.model().named_buffers())
    if "frozen" in name:  # nothing moves it, though units may be cut
        assert all(set(after[key].tolist()) <= set(value.tolist()) for key, value in model.named_buffers())


def test_a_linear_call_with_a_buffer_keeps_it_a_buffer() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    model, x = nn.Sequential(nn.Linear(8, 8), Fixed(), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(16, 8)
    batches = [(x, torch.arange(16) % 4)]
    task = Task("toy", evaluate=batches, calibrate=batches, train=batches)
    source = torch.export.export(model, (x,))
    assert [name for name, _ in program_of(source).named_buffers()] == ["1.weight"]
    small = tersor.run(source, [tersor.Slim(keep=0.5, unmet="nearest")], task).model()
    assert small(x).shape == (16, 4)


def test_a_running_average_of_statistics_stays_one() -> None:
    x = torch.randn(32, 8) * 3 + 1
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None)).eval()
    one = program_of(torch.export.export(copy.deepcopy(model), (x,)))
    for each in (model.train(), one.train()):
        each(x)
        each(x + 1)
    assert float(model[1].running_mean.abs().max()) > 0.1
    for name, value in model.named_buffers():
        assert torch.equal(one.get_buffer(name), value)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).mean(1))


@pytest.mark.parametrize("made", ["in memory", "file"])
def test_tied_weights_stay_tied(made: str, tmp_path: Path) -> None:
    tokens = torch.randint(0, 20, (16, 5), generator=torch.Generator().manual_seed(0))
    source = torch.export.export(Tied().eval(), (tokens,))
    if made == "file":
        torch.export.save(source, tmp_path / "tied.pt2")
        source = torch.export.load(tmp_path / "tied.pt2")
    batches = [(tokens, tokens[:, 0])]
    task = Task("toy", evaluate=batches, calibrate=batches, train=batches)
    result = tersor.run(source, [tersor.Finetune(epochs=2, lr=0.01), tersor.Prune(keep=0.5)], task)
    assert result.aliases == {"head.weight": "embed.weight"}
    small, fresh = result.model().eval(), Tied().eval()
    fresh.load_state_dict(small.state_dict())
    assert same(fresh(tokens), small(tokens))


def test_checks_that_are_worded_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.export.export(nn.Linear(3, 2).eval(), (torch.ones(4, 3),))
    monkeypatch.setattr(program_guards, "FAILED", "Another wording: ")
    with pytest.raises(RefusedError, match="not worded as known"):
        program_guards.guards_of(source, source.module())
