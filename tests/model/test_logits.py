"""Logits are found if unambiguous, else refused; losses of each kind agree with slow loops."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import RefusedError, TaskError
from tersor.model.logits import Logits, logits_of, not_padding
from tersor.model.losses import default_loss, plain_loss, soften
from tersor.model.outputs import as_floats, tensors_of
from tersor.model.task import Task


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int, classes: int = 2) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


# --- found ---

FOUND: dict[str, tuple[Any, Any, Any, str, int]] = {
    "[B, K]": (noise(4, 3), None, labels(4), "classes", 1),
    "int32": (noise(4, 3), None, labels(4).int(), "classes", 1),
    "[B, K, T]": (noise(4, 3, 5), None, labels(4, 5), "classes", 1),
    "[B, K, H, W]": (noise(2, 3, 4, 5), None, labels(2, 4, 5), "classes", 1),
    "[B, T, V]": (noise(4, 5, 7), None, labels(4, 5), "classes", 2),
    "one tensor in a tuple": ((noise(4, 3),), None, labels(4), "classes", 1),
    "one tensor in a dict": ({"out": noise(2, 3, 4, 5)}, None, labels(2, 4, 5), "classes", 1),
    "one of floats": ({"out": noise(4, 3), "ids": labels(4)}, None, labels(4), "classes", 1),
    "named": (SimpleNamespace(logits=noise(4, 3), hidden=noise(4, 9)), None, None, "classes", 1),
    "named in a dict": ({"loss": noise(1)[0], "logits": noise(4, 5, 7)}, None, None, "classes", 2),
    "named [B, T, T]": (SimpleNamespace(logits=noise(4, 5, 5)), None, labels(4, 5), "classes", 2),
    "named image": (SimpleNamespace(logits=noise(2, 3, 4, 5)), None, None, "classes", 1),
    "yes or no": (noise(4, 3), None, noise(4, 3) > 0, "binary", 1),
    "a kind": (noise(4, 3), "regression", None, "regression", 1),
    "a kind without targets": (noise(4, 3), "classes", None, "classes", 1),
    "a kind and targets": (noise(4, 5, 7), "classes", labels(4, 5), "classes", 2),
    "vectors": (
        SimpleNamespace(last_hidden_state=noise(4, 5, 6), pooler_output=noise(4, 6)),
        "embedding", None, "embedding", 1,
    ),
    "a function": ((noise(4, 3), noise(4, 9)), lambda out: out[0], labels(4), "classes", 1),
    "a function that returns Logits": (
        (noise(4, 5, 7), noise(4)), lambda out: Logits(out[0], "classes", -1), None, "classes", -1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_unambiguous_logits_are_found(case: str) -> None:
    output, given_, target, kind, axis = FOUND[case]
    (found,) = logits_of(output, given_, target, "task 't'")
    assert found.kind == kind
    if kind == "classes":
        assert found.axis == axis
        count = found.tensor.shape[axis]
        assert found.scores.shape[1] == count
        assert found.places == tuple(
            size for k, size in enumerate(found.tensor.shape) if k != axis % found.tensor.ndim
        )


REFUSED: dict[str, tuple[Any, Any, Any, str]] = {
    "[B, T, T]": (
        noise(4, 5, 5),
        None,
        labels(4, 5),
        r"classes may be axis 1 or 2: .*\[4, 5, 5\].*logits=\.\.\.",
    ),
    "a tuple of two": ((noise(4, 3), noise(4, 3)), None, labels(4), r"ambiguous.*logits=lambda output"),
    "nothing": ([], None, labels(4), "ambiguous"),
    "boxes": ([{"boxes": noise(2, 4), "scores": noise(2)}], None, None, "ambiguous"),
    "no targets": (
        noise(4, 3),
        None,
        None,
        r"the kind of its numbers is unknown: output float32 \[4, 3\]\. Set",
    ),
    "vectors": (SimpleNamespace(last_hidden_state=noise(4, 5, 6)), None, None, "kind of .* is unknown"),
    "numbers": (noise(4, 3), None, noise(4, 3), "kind of .* is unknown.*regression"),
    "one class": (noise(4, 1), None, labels(4), "one class.*binary, or regression"),
    "one class, named": (SimpleNamespace(logits=noise(4, 1)), None, None, "one class"),
    "other counts": (noise(4, 3), None, labels(5), "kind of .* is unknown"),
    "integers": (labels(4, 3), None, labels(4), "a tensor of floats"),
    "no tensor": ((noise(4, 3), noise(4)), lambda out: "x", labels(4), "a tensor of floats"),
    "no logits": ((noise(4, 3), noise(4)), lambda out: (), labels(4), "returned nothing"),
    "axis 0": (noise(4, 3), lambda out: Logits(out, "classes", 0), None, "axis 0 holds the samples"),
    "no such axis": (noise(4, 3), lambda out: Logits(out, "classes", 2), None, "axis=2"),
    "no such kind": (noise(4, 3), lambda out: Logits(out, "class"), None, "did you mean 'classes'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_or_wrong_logits_are_refused(case: str) -> None:
    output, given_, target, words = REFUSED[case]
    with pytest.raises(TaskError, match=words):
        logits_of(output, given_, target, "task 't'")


def test_as_floats_keeps_the_types_of_containers() -> None:
    half = noise(3).bfloat16()
    output = {
        "a": [half, (half, 3)],
        "b": SimpleNamespace(c=half, d="x"),
        "e": noise(2).double(),
        "f": labels(2),
    }
    found = as_floats(output)
    assert [t.dtype for t in tensors_of(found)] == [torch.float32] * 3 + [torch.float64, torch.int64]
    assert type(found["a"][1]) is tuple
    assert found["b"].d == "x"
    assert output["b"].c is half, "the given output is unchanged"
    assert as_floats(output["e"]) is output["e"]


# --- soft targets ---


@given(
    st.integers(1, 3), st.integers(2, 4), st.integers(1, 3), st.sampled_from([1, 2]), st.floats(0.5, 8),
    st.integers(0, 99),
)  # fmt: skip
def test_soft_targets_of_classes_agree_with_a_slow_loop(  # noqa: PLR0917 (all six are drawn)
    batch: int, classes: int, length: int, axis: int, t: float, seed: int
) -> None:
    """Positions outside the mask do not count."""
    shape = (batch, classes, length) if axis == 1 else (batch, length, classes)
    x, y = noise(*shape, seed=seed), noise(*shape, seed=seed + 1)
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    total, count = 0.0, 0
    for b in range(batch):
        for at in range(length):
            if mask[b, at]:
                mine, theirs = (v[b, :, at] if axis == 1 else v[b, at] for v in (x, y))
                q, p = ([math.exp(float(v) / t) for v in side] for side in (mine, theirs))
                q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
                total += sum(a * math.log(a / c) for a, c in zip(p, q, strict=True))
                count += 1
    found = soften(x, y, t, mask, axis=axis)
    assert float(found) == pytest.approx(t * t * total / max(count, 1), rel=1e-3, abs=1e-4)


@given(st.integers(1, 3), st.integers(1, 4), st.floats(0.5, 8), st.integers(0, 99))
def test_binary_is_the_same_as_two_classes(batch: int, width: int, t: float, seed: int) -> None:
    """sigmoid(x) is the softmax of the scores 0 and x."""
    x, y = noise(batch, width, seed=seed), noise(batch, width, seed=seed + 1)
    two = [torch.stack([torch.zeros_like(v), v], 2).reshape(-1, 2) for v in (x, y)]
    assert float(soften(x, y, t, kind="binary")) == pytest.approx(float(soften(*two, t)), rel=1e-3, abs=1e-4)


def test_regression_and_embedding_use_the_mean_squared_difference() -> None:
    x, y, mask = noise(3, 4, 5), noise(3, 4, 5, seed=1), labels(3, 4) > 0
    for kind in ("regression", "embedding"):
        assert float(soften(x, y, 4.0, kind=kind)) == pytest.approx(float(F.mse_loss(x, y)))
        want = sum(float((x[b, t] - y[b, t]).square().sum()) for b, t in mask.nonzero().tolist())
        assert float(soften(x, y, 4.0, mask, kind=kind)) == pytest.approx(want / (5 * int(mask.sum())))


@pytest.mark.parametrize("axis", [1, 2])
def test_gradients_sum_to_zero_over_the_classes(axis: int) -> None:
    """Adding a constant to all classes of a position changes no probability, so the gradient sums to 0 along
    the class axis; it is T * (q - p) at each position."""
    x, y, t = noise(2, 3, 4).requires_grad_(), noise(2, 3, 4, seed=1), 3.0
    soften(x, y, t, axis=axis).backward()
    assert x.grad is not None
    want = t * ((x / t).softmax(axis) - (y / t).softmax(axis)) / (x.numel() / x.shape[axis])
    torch.testing.assert_close(x.grad, want.detach())
    assert float(x.grad.sum(axis).abs().max()) < 1e-6
    assert float(x.grad.sum(3 - axis).abs().max()) > 1e-3


def test_a_teacher_of_another_shape_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"\[4, 5\].*\[4, 3\]"):
        soften(noise(4, 3), noise(4, 5), 1.0)


# --- the default loss ---


def test_the_default_loss_follows_the_kind() -> None:
    x, y = noise(4, 3), labels(4, classes=3)
    assert torch.equal(default_loss(x, y), F.cross_entropy(x, y))
    tokens, targets = noise(2, 5, 7), labels(2, 5, classes=7)
    by_token = (
        sum(float(F.cross_entropy(tokens[b, t], targets[b, t])) for b in range(2) for t in range(5)) / 10
    )
    assert float(default_loss(tokens, targets)) == pytest.approx(by_token)
    yes = x > 0
    assert torch.equal(default_loss(x, yes), F.binary_cross_entropy_with_logits(x, yes.float()))
    assert torch.equal(plain_loss([Logits(x, "regression")], 2 * x), F.mse_loss(x, 2 * x))
    soft = noise(4, 3).softmax(1)  # probabilities as targets, such as mixed labels
    torch.testing.assert_close(plain_loss([Logits(x, "classes")], soft), F.cross_entropy(x, soft))
    own = SimpleNamespace(loss=torch.tensor(3.0), logits=x)
    assert float(default_loss(own, y)) == 3.0


def test_padding_and_ignored_targets_do_not_count() -> None:
    x, y = noise(2, 5, 7), labels(2, 5, classes=7)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    y[0, 0] = -100
    real = [(b, t) for b in range(2) for t in range(5) if mask[b, t] and (b, t) != (0, 0)]
    want = sum(float(F.cross_entropy(x[b, t], y[b, t])) for b, t in real) / len(real)
    batch = {"x": x, "attention_mask": mask, "labels": y}
    task = Task(evaluate=[batch])
    assert float(task.loss_of(x, batch)) == pytest.approx(want)
    soft = sum(float(soften(x[b, t][None], 2 * x[b, t][None], 2.0)) for b, t in real) / len(real)
    assert float(task.soft_loss(x, 2 * x, batch, 2.0)) == pytest.approx(soft)
    every = batch | {"labels": torch.full((2, 5), -100)}
    lost = task.loss_of(x.requires_grad_(), every)
    assert float(lost.detach()) == 0
    lost.backward()
    assert not x.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("pair", [False, True])
def test_a_teacher_counts_at_tokens_that_were_not_masked(pair: bool) -> None:
    """-100 marks unmasked tokens for a masked language model, and padding for an encoder-decoder."""
    x, y, target = noise(2, 5, 7), noise(2, 5, 7, seed=1), labels(2, 5, classes=7)
    target[:, 2:] = -100
    more = {"encoder_last_hidden_state": noise(2, 5, 4)} if pair else {}
    mine, theirs = (SimpleNamespace(logits=v, loss=torch.tensor(1.0), **more) for v in (x, y))
    found = Task(evaluate=[0]).soft_loss(mine, theirs, {"labels": target}, 2.0)
    places = [(b, t) for b in range(2) for t in range(2 if pair else 5)]
    want = sum(float(soften(x[b, t][None], y[b, t][None], 2.0)) for b, t in places) / len(places)
    assert float(found) == pytest.approx(want)


def test_padding_does_not_count_in_binary_losses() -> None:
    x, y = noise(2, 5, 3), noise(2, 5, 3, seed=1)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    batch = {"x": x, "attention_mask": mask, "labels": y > 0}
    task, places = Task(evaluate=[batch]), mask.nonzero().tolist()
    terms = [F.binary_cross_entropy_with_logits(x[b, t], (y[b, t] > 0).float()) for b, t in places]
    assert float(task.loss_of(x, batch)) == pytest.approx(float(sum(terms)) / len(terms))
    terms = [soften(x[b, t][None], y[b, t][None], 2.0, kind="binary") for b, t in places]
    assert float(task.soft_loss(x, y, batch, 2.0)) == pytest.approx(float(sum(terms)) / len(terms))


def test_padding_does_not_count_if_targets_are_probabilities() -> None:
    x, y = noise(2, 5, 7), noise(2, 5, 7, seed=1).softmax(2)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    task = Task(evaluate=[0], logits=lambda output: Logits(output, "classes", 2))
    found = task.loss_of(x, {"x": x, "attention_mask": mask, "labels": y})
    terms = [-(y[b, t] * x[b, t].log_softmax(0)).sum() for b, t in mask.nonzero().tolist()]
    assert float(found) == pytest.approx(float(sum(terms)) / len(terms))


def test_the_encoders_mask_is_not_used_for_the_decoder() -> None:
    logits, mask = Logits(noise(2, 5, 7), "classes", -1), labels(2, 5)
    plain, batch = SimpleNamespace(), {"attention_mask": mask}
    decoded = SimpleNamespace(encoder_last_hidden_state=noise(2, 5, 4))
    assert torch.equal(not_padding(logits, plain, batch), mask != 0)  # type: ignore[arg-type]
    assert not_padding(logits, decoded, batch) is None
    assert not_padding(logits, plain, batch | {"decoder_input_ids": mask}) is None
    other = batch | {"decoder_attention_mask": 1 - mask}
    assert torch.equal(not_padding(logits, decoded, other), mask == 0)  # type: ignore[arg-type]
    assert not_padding(Logits(noise(2, 5), "classes"), plain, {"attention_mask": labels(2, 5)}) is None


LOSSES: dict[str, tuple[Callable[[], Any], str]] = {
    "embedding": (
        lambda: plain_loss([Logits(noise(4, 3), "embedding")], noise(4, 3)),
        "no default loss.*loss=",
    ),
    "another shape": (
        lambda: plain_loss([Logits(noise(4, 1), "regression")], noise(4)),
        "of the output's shape",
    ),
    "probabilities of another shape": (
        lambda: plain_loss([Logits(noise(4, 3), "classes")], noise(4)),
        "integer targets",
    ),
    "no tensor": (lambda: plain_loss([Logits(noise(4, 3), "classes")], [1]), "not a tensor"),
    "two, one target": (
        lambda: plain_loss([Logits(noise(4, 3), "classes")] * 2, labels(4)),
        "2 logits need a tuple of 2 targets",
    ),
}


@pytest.mark.parametrize(("call", "words"), LOSSES.values(), ids=list(LOSSES))
def test_losses_without_a_default_are_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        call()


def test_labels_are_given_to_a_model_that_takes_them() -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            return SimpleNamespace(logits=x, loss=None if labels is None else x.sum() + labels.sum())

    class Wraps(nn.Module):
        """Takes (*args, **kwargs), as DistributedDataParallel does."""

        def __init__(self) -> None:
            super().__init__()
            self.module = Takes()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    batch = {"x": noise(4, 3), "labels": labels(4)}
    task = Task(evaluate=[batch])
    for model in (Takes(), Wraps()):
        output = task.run(model, batch)
        assert torch.equal(task.loss_of(output, batch), batch["x"].sum() + batch["labels"].sum())
    own = Task(evaluate=[batch], loss=lambda out, target: F.cross_entropy(out.logits, target))
    output = own.run(Takes(), batch)
    assert output.loss is None, "a loss of one's own is the loss"
    assert torch.equal(own.loss_of(output, batch), F.cross_entropy(batch["x"], batch["labels"]))
