"""Task: scores agree with plain loops over the same data; misfits are refused with the way out."""

import random
import re
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import tersor
from tersor.errors import TaskError
from tersor.model.batches import evaluating, hash_batch, move, shapes, steady
from tersor.model.builtin_metrics import accuracy
from tersor.model.example import example_inputs
from tersor.model.simulate import Simulated
from tersor.model.task import Task

SAMPLES, FEATURES, CLASSES = 23, 5, 3


def data(n: int = SAMPLES, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, FEATURES, generator=g), torch.randint(CLASSES, (n,), generator=g)


X, Y = data()


def net(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, CLASSES)
        )


def pieces(size: int) -> list[tuple[Tensor, Tensor]]:
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, SAMPLES, size)]


class Stream(IterableDataset):
    """Batches by hand, without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(pieces(8))


SOURCES: dict[str, Any] = {
    "list": pieces(7),
    "batches of one": pieces(1),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=6),
    "stream": DataLoader(Stream(), batch_size=None),
    "function": lambda: iter(pieces(23)),
    "generator function": lambda: (piece for piece in pieces(4)),
    "dicts": [{"input": x, "labels": y} for x, y in pieces(9)],
    "dicts with label": [{"input": x, "label": y} for x, y in pieces(9)],
    "lists": [[x, y] for x, y in pieces(9)],
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=list(SOURCES))
def test_scores_are_those_of_a_plain_loop(source: Any) -> None:
    model = net().eval()
    with torch.no_grad():
        expected = [float(model(X[i : i + 1]).argmax() == Y[i]) for i in range(SAMPLES)]
    scores = Task(evaluate=source).scores(model)
    assert scores.dtype == torch.float32
    assert scores.tolist() == expected


def test_a_custom_metric_feed_and_target() -> None:
    model = net().eval()
    task = Task(
        "regression",
        evaluate=[SimpleNamespace(a=x, b=y) for x, y in pieces(10)],
        feed=lambda model, batch: model(batch.a) * 2,
        target=lambda batch: batch.b,
        metric=lambda output, target: -output.square().sum(1).double() - target,
    )
    with torch.no_grad():
        expected = torch.stack([-(2 * model(X[i : i + 1])).square().sum() - Y[i] for i in range(SAMPLES)])
    assert task.scores(model).dtype == torch.float32
    assert torch.allclose(task.scores(model), expected, atol=1e-6)


def test_several_inputs_and_named_tuples() -> None:
    pair = namedtuple("pair", "a b target")

    class Adds(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    task = Task(evaluate=[pair(X[:, :3], -X[:, :3], Y)])
    task.check(Adds())
    assert task.inputs(pair(1, 2, 3)) == ((1, 2), {})
    assert task.target_of(pair(1, 2, 3)) == 3
    assert type(move(pair(X, X, Y), torch.device("cpu"))) is pair


def test_the_output_is_raw_and_its_logits_are_found() -> None:
    class Like(nn.Module):
        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=x[:, :3], hidden=x)

    task = Task(evaluate=pieces(5))
    output = task.run(Like(), (X, Y))
    assert torch.equal(output.hidden, X)
    assert torch.equal(task.logits_of(output)[0].tensor, X[:, :3])
    assert torch.equal(task.scores(Like()), (X[:, :3].argmax(1) == Y).float())


def test_modes_random_states_and_gradients_are_not_changed() -> None:
    random.seed(7)  # not the state that passes start from
    np.random.seed(7)  # noqa: NPY002
    model = net().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    own = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=own)
    task = Task(evaluate=loader, calibrate=loader)
    states = torch.get_rng_state(), own.get_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    first = task.scores(model)
    second = task.scores(model)
    task.check(model)
    task.digest()
    example_inputs(task)
    assert torch.equal(first, second), "a shuffled evaluation set must have a fixed order, for pairs"
    after = torch.get_rng_state(), own.get_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    assert torch.equal(states[0], after[0])
    assert torch.equal(states[1], after[1])
    assert states[2:] == after[2:]
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert torch.is_grad_enabled()


def test_modes_are_restored_if_the_model_fails() -> None:
    model = net().train()
    with pytest.raises(TaskError):
        Task(evaluate=[(X[:, :2], Y)]).scores(model)
    assert all(module.training for module in model.modules())
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / 0
    assert all(module.training for module in model.modules())


def test_a_task_is_made_without_touching_its_loaders() -> None:
    class Counted(DataLoader):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return super().__iter__()

    loader, state = Counted(TensorDataset(X, Y), batch_size=4, shuffle=True), torch.get_rng_state()
    task = Task(evaluate=loader, calibrate=loader, train=loader)
    assert task.batches("train") is loader, "Accelerate needs the loader itself"
    assert loader.passes == 0
    assert torch.equal(state, torch.get_rng_state())


def test_watch_is_called_for_each_batch() -> None:
    seen: list[tuple[int, int | None]] = []
    Task(evaluate=pieces(10)).scores(net(), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    Task(evaluate=lambda: iter(pieces(10))).scores(net(), lambda done, total: seen.append((done, total)))
    assert seen == [(1, None), (2, None), (3, None)]


ONE = [(X, Y)]
BIRTH: dict[str, tuple[Callable[[], Any], str]] = {
    "generator": (lambda: Task(evaluate=(piece for piece in ONE)), "only once .* evaluate=lambda"),
    "iterator": (lambda: Task(evaluate=ONE, train=iter(ONE)), "train= can be iterated only once"),
    "one batch": (lambda: Task(evaluate=(X, Y)), r"one batch, \(float32 \[23, 5\], int64 \[23\]\)"),
    "one batch as list": (lambda: Task(evaluate=[X, Y]), "looks like one batch"),
    "samples": (lambda: Task(evaluate=TensorDataset(X, Y)), "single samples.*DataLoader"),
    "tensor": (lambda: Task(evaluate=X), "is one Tensor"),
    "number": (lambda: Task(evaluate=ONE, calibrate=3), "calibrate= is one int"),
    "text": (lambda: Task(evaluate="digits"), "is one str"),
    "nothing": (lambda: Task(evaluate=None), "is one NoneType"),
    "misspelt metric": (lambda: Task(evaluate=ONE, metric="acuracy"), "did you mean 'accuracy'"),
    "metric": (lambda: Task(evaluate=ONE, metric=3), r"metric=3, but it is a function, metric\(output"),
    "loss": (lambda: Task(evaluate=ONE, loss="mse"), "loss='mse', but it is a function"),
    "feed": (lambda: Task(evaluate=ONE, feed=1), r"feed\(model, batch\)"),
    "target": (lambda: Task(evaluate=ONE, target=1), r"target\(batch\)"),
    "fingerprint": (lambda: Task(evaluate=ONE, fingerprint=b"x"), "fingerprint=b'x'"),
    "name": (lambda: Task("", evaluate=ONE), "name=''"),
    "logits": (lambda: Task(evaluate=ONE, logits="class"), "logits='class'.*did you mean 'classes'"),
    "misspelt set": (lambda: Task(evaluate=ONE).batches("evaluation"), "did you mean 'evaluate'"),
    "no training": (lambda: Task("t", evaluate=ONE).batches("train"), r"task 't'.*train.*train=\.\.\."),
    "empty list": (lambda: Task(evaluate=ONE, calibrate=[]).batches("calibrate"), "calibrate set is empty"),
    "empty pass": (
        lambda: list(Task(evaluate=lambda: iter(())).batches("evaluate")),
        "evaluate set is empty",
    ),
    "no iterator": (lambda: list(Task(evaluate=lambda: 3).batches("evaluate")), "returned a int"),
}


@pytest.mark.parametrize(("call", "words"), BIRTH.values(), ids=list(BIRTH))
def test_wrong_settings_are_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        call()


def test_a_function_that_returns_the_same_iterator_is_refused_in_the_second_pass() -> None:
    once = iter(ONE)
    batches = Task(evaluate=lambda: once).batches("evaluate")
    assert len(list(batches)) == 1
    with pytest.raises(TaskError, match="empty"):
        list(batches)


def nan_net() -> nn.Module:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    return model


MISFITS: dict[str, tuple[Callable[[], tuple[Task, Any]], str]] = {
    "model": (lambda: (Task(evaluate=ONE), "net"), "the model is a str, but it is a torch.nn.Module"),
    "shape": (
        lambda: (Task(evaluate=[(X[:, :2], Y)]), net()),
        r"not fit the model Sequential: a batch is \(float32 \[23, 2\], int64 \[23\]\)\. RuntimeError: mat1",
    ),
    "keyword": (lambda: (Task(evaluate=[{"picture": X, "labels": Y}]), net()), "picture: float32.*TypeError"),
    "labels": (lambda: (Task(evaluate=ONE, train=[(X, Y + 1)]), net()), "loss does not fit.*out of bounds"),
    "labels for the metric": (
        lambda: (Task(evaluate=[(X, Y + 1)], loss=lambda output, _: output.sum()), net()),
        "targets from 1 to 3, but the model scores 3 classes",
    ),
    "target": (lambda: (Task(evaluate=[(X, Y[:5])]), net()), "do not fit: it needs scores"),
    "target of the loss": (
        lambda: (Task(evaluate=ONE, train=[(X, Y[:5])], logits="classes"), net()),
        "loss does not fit: .*int64 \\[5\\]",
    ),
    "no target": (lambda: (Task(evaluate=[(X,)]), net()), "no target"),
    "odd batch": (lambda: (Task(evaluate=[3]), net()), "a batch is int.*give feed="),
    "scalar metric": (
        lambda: (Task(evaluate=ONE, metric=lambda o, t: (o.argmax(1) == t).float().mean()), net()),
        r"metric returned float32 \[\], but must return one score a sample, \[23\]",
    ),
    "short metric": (
        lambda: (Task(evaluate=ONE, metric=lambda o, t: o.mean(0)), net()),
        r"metric returned float32 \[3\]",
    ),
    "NaN metric": (
        lambda: (Task(evaluate=ONE, metric=lambda o, t: o[:, 0] / 0 * 0), net()),
        "scores that are not finite",
    ),
    "vector loss": (
        lambda: (Task(evaluate=ONE, train=ONE, loss=lambda o, t: o.sum(1)), net()),
        r"the loss returned float32 \[23\], but must return one number",
    ),
    "NaN data": (lambda: (Task(evaluate=[(X * torch.nan, Y)]), net()), r"is NaN: the batch holds NaN\.$"),
    "NaN training data": (
        lambda: (Task(evaluate=ONE, train=[(X * torch.nan, Y)]), net()),
        r"loss is nan .*\)\.$",
    ),
    "NaN weights": (lambda: (Task(evaluate=ONE), nan_net()), "not finite: 3.weight"),
    "float target": (
        lambda: (
            Task(evaluate=[(X, Y.float()[:, None])], loss=nn.functional.l1_loss),
            nn.Linear(FEATURES, 1),
        ),
        "Give the task a metric=",
    ),
}


@pytest.mark.parametrize(("make", "words"), MISFITS.values(), ids=list(MISFITS))
def test_a_task_that_does_not_fit_is_refused(make: Callable[[], tuple[Task, Any]], words: str) -> None:
    task, model = make()
    with pytest.raises(TaskError) as caught:
        task.check(model)
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)


def test_infinities_in_a_mask_and_8_bit_floats_are_not_blamed_for_nan() -> None:
    class Masks(nn.Linear):
        def __init__(self) -> None:
            super().__init__(FEATURES, 3)
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
            self.eight = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            scores = super().forward(x)
            return {"logits": scores, "padding": scores * torch.nan}

    model = Masks()
    Task(evaluate=ONE).check(model)
    with pytest.raises(TaskError, match=r"the loss is nan on the first batch \(.*\)\.$"):
        Task(evaluate=ONE, train=ONE, loss=lambda o, t: o["padding"].sum()).check(model)
    with torch.no_grad():
        model.mask[0, 0] = torch.nan  # type: ignore[index,operator]
    with pytest.raises(TaskError, match="these weights are not finite: mask"):
        Task(evaluate=ONE).check(model)


@pytest.mark.parametrize("source", SOURCES.values(), ids=list(SOURCES))
def test_a_task_that_fits_passes_the_check(source: Any) -> None:
    Task(evaluate=source).check(net())


@given(st.integers(1, 9), st.integers(1, 5), st.lists(st.integers(1, 4), max_size=2), st.integers(0, 99))
def test_accuracy_against_a_slow_loop(n: int, k: int, positions: list[int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    output, target = (
        torch.randn(n, k, *positions, generator=g),
        torch.randint(k, (n, *positions), generator=g),
    )
    found = accuracy(output, target)
    for b in range(n):
        hits = [
            max(range(k), key=lambda c, b=b, place=place: float(output[(b, c, *place)]))
            == target[(b, *place)]
            for place in np.ndindex(*positions)
        ]
        assert found[b] == pytest.approx(sum(map(bool, hits)) / len(hits))


def test_the_digest_depends_on_the_data_only() -> None:
    digest = Task(evaluate=pieces(5)).digest()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert digest == Task("renamed", evaluate=[(x.clone(), y.clone()) for x, y in pieces(5)]).digest()
    assert digest == Task(evaluate=pieces(5), metric=lambda o, t: o[:, 0]).digest()
    changed = X.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
    others = {
        "one bit": Task(evaluate=[(changed[:5], Y[:5]), *pieces(5)[1:]]),
        "dtype": Task(evaluate=[(x.double(), y) for x, y in pieces(5)]),
        "shape": Task(evaluate=[(x[:, None], y) for x, y in pieces(5)]),
        "nesting": Task(evaluate=[[[x], y] for x, y in pieces(5)]),
        "length": Task(evaluate=[*pieces(5), *pieces(5)]),
        "calibration": Task(evaluate=pieces(5), calibrate=pieces(5)),
        "training": Task(evaluate=pieces(5), train=pieces(5)),
        "other batches": Task(evaluate=pieces(6)),
    }
    digests = {name: task.digest() for name, task in others.items()}
    assert len({digest, *digests.values()}) == 1 + len(others), digests
    assert Task(evaluate=pieces(5), fingerprint="v1").digest() == "v1"


def test_digest_of_every_kind_of_value() -> None:
    class Update:
        def __init__(self) -> None:
            self.data = b""

        def update(self, data: bytes, /) -> None:
            self.data += data

    values = [
        *(
            torch.zeros(3, dtype=d)
            for d in (torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.int64)
        ),
        *(torch.zeros(()), torch.zeros(0), np.zeros(3), np.zeros(3, np.float32), np.float32(1)),
        *("a", b"a", 1, 1.0, True, None, {"a": 1}, {"b": 1}, [1, 2], [[1], 2], {1: 2}),
        torch.arange(6).reshape(2, 3).T,
        torch.arange(6).reshape(3, 2),
    ]
    found = set()
    for value in values:
        into = Update()
        hash_batch(into, value)
        found.add(into.data)
    assert len(found) == len(values)
    stretched = Task(evaluate=[(X[:1, 0].expand(4), Y[:4])])  # expanded: one number in memory, four elements
    assert stretched.digest() == Task(evaluate=[(X[:1, 0].repeat(4), Y[:4])]).digest()
    with pytest.raises(TaskError, match="holds a object.*fingerprint="):
        Task(evaluate=[(object(), 1)]).digest()


def test_example_inputs() -> None:
    assert torch.equal(example_inputs(Task(evaluate=pieces(4)))[0], X[:4])
    assert torch.equal(example_inputs(Task(evaluate=pieces(4), calibrate=pieces(3)))[0], X[:3])
    assert torch.equal(example_inputs(Task(evaluate=pieces(4), calibrate=[X[:2], X[2:]]))[0], X[:2])
    named = example_inputs(Task(evaluate=[{"input": X, "labels": Y}]))
    assert isinstance(named, dict)
    assert list(named) == ["input"]
    assert example_inputs(Task(evaluate=ONE, example=X)) == (X,)
    assert example_inputs(Task(evaluate=ONE, example=[X, Y])) == (X, Y)
    assert example_inputs(Task(evaluate=ONE, example={"a": X})) == {"a": X}


class Shifts(nn.Module):
    """Like T5 and Whisper: the decoder gets the labels, shifted by one position."""

    config = SimpleNamespace(is_encoder_decoder=True)

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(FEATURES, 4), Decodes()

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def forward(self, x: Tensor, decoder_input_ids: Any = None, labels: Any = None) -> Any:
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = nn.functional.pad(labels[:, :-1], (1, 0))
        if decoder_input_ids is None:
            raise ValueError("specify decoder_input_ids")
        return SimpleNamespace(logits=self.decoder(input_ids=decoder_input_ids, states=self.encoder(x)))


class Decodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.place, self.head = nn.Embedding(9, 4), nn.Embedding(6, 4), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor, states: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1])
        scores: Tensor = self.head(self.tokens(input_ids) + self.place(places) + states[:, None])
        return scores


def test_example_inputs_include_decoder_inputs_from_labels() -> None:
    ids = torch.randint(9, (4, 6))
    task = Task(evaluate=[{"x": X[:4], "labels": ids}])
    model = Shifts()
    found = example_inputs(task, model)
    assert isinstance(found, dict)
    assert list(found) == ["x", "decoder_input_ids"]
    assert torch.equal(found["decoder_input_ids"], nn.functional.pad(ids[:, :-1], (1, 0)))
    assert torch.equal(model(**found).logits, task.run(model, {"x": X[:4], "labels": ids}).logits)
    given = {"x": X[:4], "decoder_input_ids": ids, "labels": ids}
    assert example_inputs(Task(evaluate=[given]), model)["decoder_input_ids"] is ids
    assert list(example_inputs(task)) == ["x"]  # decoder inputs need the model


class Passes(nn.Module):
    """Wraps an encoder-decoder, and passes all of its inputs on, or only some."""

    def __init__(self, everything: bool) -> None:
        super().__init__()
        self.net = Shifts()
        self.forward = self.every if everything else self.some

    def every(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def some(self, x: Tensor, labels: Any = None) -> Any:
        return self.net(x, labels=labels)


@pytest.mark.parametrize("wrapped", [Simulated, lambda net: Passes(True)], ids=["grids or codes", "any"])
def test_an_encoder_decoder_in_a_wrapper_gets_its_decoder_inputs(wrapped: Any) -> None:
    ids = torch.randint(9, (4, 6))
    task = Task(evaluate=[{"x": X[:4], "labels": ids}])
    found = example_inputs(task, wrapped(Shifts()))
    assert isinstance(found, dict)
    assert torch.equal(found["decoder_input_ids"], nn.functional.pad(ids[:, :-1], (1, 0)))
    assert list(example_inputs(task, Passes(False))) == ["x"]  # its forward does not take them


@pytest.mark.wide
@pytest.mark.parametrize("step", [tersor.Quantize(bits=4), tersor.Quantize(activations=8)], ids=str)
def test_a_quantized_encoder_decoder_is_exported(step: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    ids = torch.randint(9, (4, 6))
    task = Task(evaluate=[{"x": X[:4], "labels": ids}], calibrate=[{"x": X[:4], "labels": ids}])
    state = tersor.run(Shifts(), [step, tersor.Export()], task, out=str(tmp_path))
    assert (tmp_path / "model.onnx").exists()
    assert state.ledger.notes("written")


def test_positions_of_an_encoder_decoder_are_left_alone() -> None:
    task = Task(evaluate=[{"x": X[:4], "labels": torch.randint(9, (4, 6))}])
    state = tersor.run(Shifts(), tersor.Prune(keep=0.5, per="tensor"), task)
    assert (state.state_dict()["decoder.place.weight"] != 0).all()
    assert (state.state_dict()["decoder.tokens.weight"] == 0).float().mean() == 0.5


def test_example_inputs_of_a_task_with_feed() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
            return a + b

    own = Task(evaluate=ONE, feed=lambda model, batch: model(batch[0] * 2, b=batch[0]))
    with pytest.raises(TaskError, match="give example="):
        example_inputs(own)
    model = Two()
    seen = example_inputs(own, model)
    assert isinstance(seen, dict)
    assert torch.equal(seen["a"], X * 2)
    assert torch.equal(seen["b"], X)
    assert not model._forward_pre_hooks
    plain = Task(evaluate=ONE, feed=lambda model, batch: model(batch[0] * 2))
    assert torch.equal(example_inputs(plain, net())[0], X * 2)
    with pytest.raises(TaskError, match="did not call the model"):
        example_inputs(Task(evaluate=ONE, feed=lambda model, batch: batch[0]), net())


def test_batches_move_and_are_described() -> None:
    meta = torch.device("meta")
    moved = move({"a": [X, (Y, "text")], "b": 3}, meta)
    assert moved["a"][0].device == meta
    assert moved["a"][1][0].device == meta
    assert moved["a"][1][1] == "text"
    assert moved["b"] == 3
    packed = nn.utils.rnn.pack_padded_sequence(torch.zeros(3, 2, 1), torch.tensor([3, 1]))
    assert type(move(packed, torch.device("cpu"))) is type(packed)
    assert (
        shapes(((X, Y), {"n": np.zeros(2)}, 3))
        == "((float32 [23, 5], int64 [23]), {n: numpy float64 [2]}, int)"
    )


def test_steady_repeats_and_restores_random_states() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002

    with steady():
        first = draw()
    outside = draw()
    with steady():
        second = draw()
    assert first == second
    assert outside != draw()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device to seed")
def test_seeding_formats_no_stack_for_missing_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed does so for each kind of device that is not initialized: 5 ms a call."""
    seen: list[int] = []
    monkeypatch.setattr("traceback.format_stack", lambda *given: seen.append(1) or [])
    torch.manual_seed(0)
    assert seen
    seen.clear()
    with steady():
        torch.rand(3)
    assert not seen


def test_repr_is_one_line() -> None:
    assert repr(Task("t", evaluate=pieces(5), train=lambda: iter(ONE))) == (
        "Task('t', evaluate=5 batches, train=? batches, metric=accuracy)"
    )
