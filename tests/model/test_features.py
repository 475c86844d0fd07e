"""Features of different widths: the trained map against plain PyTorch, refusals, and removal of the map."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interrupted import resumed
from tiny import Tiny, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from tersor import Distill, RefusedError, SettingError, Task, run
from tersor.check import check
from tersor.core.recipe import Recipe
from tersor.core.state import start
from tersor.model.feature_loss import feature_loss, match
from tersor.model.features import features_of, first_tensor, pairs_of, token_mask
from tersor.model.trainable_forms import TrainableForms
from tersor.model.training_loop import TrainingPlan, fit


class Wide(nn.Module):
    """A conv net with maps of 13 channels and other layer names than the student."""

    def __init__(self, width: int = 13, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, stride, 1)
        self.norm, self.last = nn.BatchNorm2d(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu().mean((2, 3)))


def wide(width: int = 13, stride: int = 1) -> Wide:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Wide(width, stride)


def tuned_of(t: Tiny) -> TrainableForms:
    given = start(t.model)
    return TrainableForms(
        t.model, given.forms, given.sites, [n for n, s in given.sites.items() if s.is_parameter]
    )


def test_names_are_pairs() -> None:
    assert pairs_of("a, b = t.b,c") == [("a", "a"), ("b", "t.b"), ("c", "c")]
    assert pairs_of("") == []


def test_maps_are_trained_as_in_plain_pytorch() -> None:
    """Student, map and optimizer by hand, on the same batches; one pair of different widths, one of equal."""
    t, teacher, lr, weight = tiny("conv"), wide(), 0.02, 0.7
    t.model.drop.p = 0.0
    batches = list(t.task.batches("calibrate"))
    text = "stem=first, head=last"
    plan = TrainingPlan(
        3,
        lr,
        "constant",
        features=text,
        feature_weight=weight,
        teacher_weight=0.0,
        weight_decay=0.1,
        optimizer="sgd",
    )
    tuned = tuned_of(t)
    first = features_of(text, tuned, copy.deepcopy(teacher).eval(), t.task, 5).maps
    assert {key: tuple(one.weight.shape) for key, one in first.items()} == {"0": (13, 7)}
    along = copy.deepcopy(first["0"])
    fit(tuned, replace(t.task, train=batches), plan, seed=5, teacher=copy.deepcopy(teacher))
    assert not any("maps" in key for key in tuned.state_dict())

    model, teacher = copy.deepcopy(t.model).train(), teacher.eval()
    caught: dict[str, Tensor] = {}
    for name in ("stem", "head"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: caught.update({name: out})
        )
    every = [*model.parameters(), *along.parameters()]
    groups = [{"params": [p for p in every if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in every if p.ndim < 2]}]  # fmt: skip
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    for x, y in batches * 3:
        optimizer.zero_grad()
        loss = t.task.loss(model(x), y)
        with torch.no_grad():
            a, b = teacher.first(x), teacher(x)
        seen = F.conv2d(caught["stem"], along.weight[:, :, None, None], along.bias)
        loss = loss + weight * (F.mse_loss(seen, a) + F.mse_loss(caught["head"], b))
        loss.backward()
        optimizer.step()
    values = {name: form.decode() for name, form in tuned.fold().items()}
    for name, value in model.named_parameters():
        torch.testing.assert_close(values[name], value, rtol=1e-3, atol=1e-5)


def test_same_widths_have_no_map() -> None:
    t = tiny("conv")
    found = features_of("stem=first, block=first", tuned_of(t), wide(7), t.task, 0)
    assert not found.maps


def test_shapes_correspond_in_channels_and_size() -> None:
    for a, b, want in (
        ((8, 7, 6, 6), (8, 13, 6, 6), (1, (7, 13), None)),
        ((8, 6, 16), (8, 6, 20), (2, (16, 20), None)),
        ((8, 16, 6), (8, 20, 6), (1, (16, 20), None)),
        ((8, 16), (8, 20), (1, (16, 20), None)),
        ((8, 6, 6, 7), (8, 6, 6, 13), (3, (7, 13), None)),
        ((8, 7, 6, 6), (8, 13, 3, 12), (1, (7, 13), (3, 6))),
        ((8, 7, 6, 6), (8, 7, 3, 6), (1, None, (3, 6))),
    ):
        assert match("a", "b", a, b) == want
    assert match("a", "b", (8, 16), (8, 16)).widths is None
    for a, b in (((8, 7), (8, 7, 1)), ((8, 7), (4, 7)), ((8, 7, 5), (8, 6, 4)), ((8,), (8,))):
        with pytest.raises(RefusedError, match="outputs may differ in the number of channels"):
            match("a", "b", a, b)


NAMES = ("a", "b")


def loss(kind: str, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    return feature_loss(kind, NAMES, x, y, along=nn.Identity(), mask=mask)


def test_larger_maps_are_averaged_to_the_smaller() -> None:
    x, y = torch.randn(4, 7, 6, 6), torch.randn(4, 7, 3, 6)
    small = x.reshape(4, 7, 3, 2, 6).mean(3)
    torch.testing.assert_close(loss("outputs", x, y), F.mse_loss(small, y))


def test_attention_compares_where_maps_are_active() -> None:
    """Against loops over samples and positions; widths and sizes differ."""
    x, y = torch.randn(3, 5, 4, 4), torch.randn(3, 8, 2, 2)
    want = 0.0
    for n in range(3):
        maps = []
        for z, side in ((x, 2), (y, 1)):
            at = [
                sum(
                    float((z[n, :, i, j] ** 2).mean())
                    for i in range(side * row, side * (row + 1))
                    for j in range(side * column, side * (column + 1))
                ) / side**2
                for row in range(2)
                for column in range(2)
            ]  # fmt: skip
            norm = sum(value**2 for value in at) ** 0.5
            maps.append([value / norm for value in at])
        want += sum((p - q) ** 2 for p, q in zip(*maps, strict=True))
    assert float(loss("attention", x, y)) == pytest.approx(want / 3, rel=1e-4)
    torch.testing.assert_close(loss("attention", 3 * x, x), torch.tensor(0.0), atol=1e-6, rtol=0)
    with pytest.raises(RefusedError, match="no positions to attend to"):
        loss("attention", torch.randn(3, 5), torch.randn(3, 5))


def test_relation_compares_which_samples_are_alike() -> None:
    x, y = torch.randn(4, 5, 2), torch.randn(4, 9)
    grams = []
    for z in (x.flatten(1), y):
        gram = [[float(p @ q) for q in z] for p in z]
        grams.append([[v / sum(w**2 for w in row) ** 0.5 for v in row] for row in gram])
    want = sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(4) for j in range(4)) / 16
    assert float(loss("relation", x, y)) == pytest.approx(want, rel=1e-4)
    turned = y @ torch.linalg.qr(torch.randn(9, 9))[0]  # a rotation changes no product of two samples
    torch.testing.assert_close(loss("relation", turned, y), torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["outputs", "attention", "relation"])
def test_padded_tokens_do_not_count(kind: str) -> None:
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    other = torch.where(mask[..., None], x, 7 * torch.randn(2, 4, 3))
    torch.testing.assert_close(loss(kind, x, y, mask), loss(kind, other, y, mask))
    assert not torch.allclose(loss(kind, x, y), loss(kind, other, y))


@pytest.mark.parametrize("kind", ["attention", "relation"])
def test_a_student_learns_where_a_teacher_of_another_size_is_active(kind: str) -> None:
    """Without soft targets and labels: only the layers' outputs teach. No map is learned."""
    t, teacher = tiny("conv"), wide(stride=2)
    t.model.drop.p = 0.0
    step = Distill(
        teacher=teacher, features="stem=first", feature_loss=kind, feature_weight=100.0, teacher_weight=1.0,
        epochs=20, lr=0.02,
    )  # fmt: skip
    assert not features_of("stem=first", tuned_of(t), teacher, t.task, 0, kind=kind).maps
    x = next(iter(t.task.batches("calibrate")))[0]

    def apart(net: nn.Module) -> float:
        stem: list[Tensor] = []
        with net.get_submodule("stem").register_forward_hook(lambda m, a, out: stem.append(out)):
            net.eval()(x)
        return float(loss(kind, stem[0], teacher.eval().first(x)).detach())

    taught = run(t.model, step, t.task).model()
    assert apart(taught) < 0.6 * apart(copy.deepcopy(t.model))


@pytest.mark.parametrize("name", ["attention", "lstm"])
def test_maps_of_sequences_are_along_the_last_axis(name: str) -> None:
    t = tiny(name)
    layer, width = {"attention": ("norm", 8), "lstm": ("cell", 10)}[name]
    teacher = copy.deepcopy(t.model)
    if name == "attention":
        teacher.norm = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12))
        teacher.qkv = nn.Linear(12, 24)
    else:
        teacher.cell, teacher.head = nn.LSTM(3, 6, batch_first=True, bidirectional=True), nn.Linear(12, 3)
    (along,) = features_of(layer, tuned_of(t), teacher, t.task, 0).maps.values()
    assert (along.axis, along.in_features, along.out_features) == (2, width, 12)
    result = run(t.model, Distill(epochs=2, features=layer, teacher=teacher), t.task)
    assert result.nbytes == start(t.model).nbytes


def test_what_cannot_be_matched_is_refused_before_anything_trains() -> None:
    t = tiny("conv")
    with pytest.raises(RefusedError, match=r"stem returns \[8, 7, 6, 6\], the teacher's last \[8, 3\]"):
        run(t.model, Distill(features="stem=last", teacher=wide()), t.task)
    with pytest.raises(RefusedError, match="no positions to attend to"):
        run(t.model, Distill(features="head=last", feature_loss="attention", teacher=wide()), t.task)
    with pytest.raises(SettingError, match="feature_loss='atention'"):
        Distill(features="head=last", feature_loss="atention")
    with pytest.raises(
        SettingError, match=r"features: the teacher has no layer 'frist'; did you mean 'first'"
    ):
        run(t.model, Distill(features="stem=frist", teacher=wide()), t.task)

    class Twice(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(-x)

    with pytest.raises(RefusedError, match="stem runs 1 times, the teacher's first 2 times"):
        run(t.model, Distill(features="stem=first", teacher=Twice()), t.task)


def test_the_teacher_does_not_change() -> None:
    t, teacher = tiny("conv"), wide()
    before = copy.deepcopy(teacher.state_dict())
    run(t.model, Distill(epochs=1, features="stem=first", teacher=teacher), t.task)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_a_dry_run_knows_both_names() -> None:
    (facts,) = check(Recipe((Distill(features="a.b=c"),)))
    assert facts["needs"] == "a task with training batches"


def test_a_killed_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    t, step = tiny("conv"), Distill(epochs=3, lr=0.02, features="stem=first", teacher=wide())
    whole = run(t.model, step, t.task)
    assert resumed(t.model, step, t.task, tmp_path).ledger.digest == whole.ledger.digest


def test_a_map_that_does_not_learn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map's parameters must be in the optimizer; the map in the loss alone is not enough."""
    from tersor.model import training_loop as module

    seen: list[Any] = []
    make = module.make_optimizer
    monkeypatch.setattr(module, "make_optimizer", lambda g, plan: seen.extend(g) or make(g, plan))
    t = tiny("conv")
    run(t.model, Distill(epochs=1, features="stem=first", teacher=wide()), t.task)
    shapes = [tuple(p.shape) for group in seen for p in group["params"]]
    assert (13, 7) in shapes
    assert (13,) in shapes


class Tokens(nn.Module):
    """Its layer returns a mapping, as Hugging Face's encoders do."""

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
            return {"places": torch.arange(x.shape[1]), "vectors": super().forward(x)}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 6), self.Layer(6, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        vectors = self.layer(self.table(input_ids))["vectors"]
        return (vectors * attention_mask[..., None]).sum(1)


@pytest.mark.parametrize("width", [4, 5])
def test_padding_is_left_out(width: int) -> None:
    """Two batches that differ only in the padding give the same training."""

    def learned(pad: int) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model, teacher = Tokens(4), Tokens(width)
        ids = torch.tensor([[1, 2, 3, pad, pad], [4, 5, 6, 7, pad]])
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}
        step = Distill(teacher=teacher, features="layer", teacher_weight=0.0, epochs=3, lr=0.1)
        return run(model, step, Task(evaluate=[batch], train=[batch])).state_dict()

    one, other = learned(7), learned(8)
    torch.testing.assert_close(one, other)


class Couple(nn.Module):
    """Encodes the tokens, and decodes as many, none of which is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.decoder = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        states = self.table(input_ids)
        return SimpleNamespace(logits=self.decoder(states).sum(1), encoder_last_hidden_state=states)


def test_the_encoders_padding_counts_in_the_decoder() -> None:
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    task, model, teacher = Task(evaluate=[batch], train=[batch]), Couple(), Couple()
    with torch.no_grad():
        apart = F.mse_loss(*(net.decoder(net.table(ids)) for net in (model, teacher)))
        want = F.cross_entropy(model(ids, mask).logits, batch["labels"]) + apart
    given = start(model)
    tuned = TrainableForms(model, given.forms, given.sites, list(given.sites))
    found = fit(tuned, task, TrainingPlan(features="decoder"), seed=0, teacher=teacher)
    assert found["loss"] == pytest.approx(float(want), rel=1e-5)


def test_a_layer_without_floats_is_refused() -> None:
    with pytest.raises(RefusedError, match="no tensor of floats"):
        first_tensor({"places": torch.arange(3)})


def test_the_mask_is_that_of_the_encoder_or_the_decoder() -> None:
    mask, other = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]])
    batch = {"attention_mask": mask, "decoder_attention_mask": other}
    x = torch.zeros(1, 3, 4)
    assert torch.equal(token_mask("encoder.block.1", x, batch), mask != 0)  # type: ignore[arg-type]
    assert torch.equal(token_mask("decoder.block.1", x, batch), other != 0)  # type: ignore[arg-type]
    assert token_mask("encoder.block.1", torch.zeros(1, 4, 3), batch) is None
    made_of_labels = {"attention_mask": mask, "labels": mask}  # does not show which tokens are padding
    pair = SimpleNamespace(encoder_last_hidden_state=x)
    assert token_mask("decoder.block.1", x, made_of_labels, pair) is None
    assert torch.equal(token_mask("encoder.block.1", x, made_of_labels, pair), mask != 0)  # type: ignore[arg-type]
    alone = token_mask("model.decoder.layers.0", x, made_of_labels)  # OPT: a decoder without an encoder
    assert torch.equal(alone, mask != 0)  # type: ignore[arg-type]
