"""Unlisted: state that training changes and no state dict lists is refused if outputs depend on it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import start
from tersor.errors import RefusedError
from tersor.model import hidden_state
from tersor.model.hidden_state import check_unlisted
from tersor.model.trainable_forms import TrainableForms
from tersor.steps import Finetune, Measure


class Whitened(nn.Module):
    """Divides the inputs by a running mean of their magnitudes, as normalizations do."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.body = where, tiny("mlp").model
        if where == "buffer":
            self.register_buffer("size", torch.ones(()), persistent=False)
        elif where == "persistent":
            self.register_buffer("size", torch.ones(()))
        elif where == "list":
            self.kept = {"sizes": [torch.ones(())]}
        elif where == "array":
            self.size = np.ones(1, np.float32)
        else:
            self.size = torch.ones(()) if where == "tensor" else 1.0

    @property
    def now(self) -> Any:
        return self.kept["sizes"][0] if self.where == "list" else self.size

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.detach().abs().mean()
            if self.where == "number":
                self.size = 0.5 * self.size + 0.5 * float(mean)
            elif self.where == "array":
                self.size *= 0.5 + 0.5 * float(mean)
            elif self.where == "rebound":
                self.size = 0.5 * self.size + 0.5 * mean
            else:
                self.now.mul_(0.5).add_(0.5 * mean)
        return self.body(x / torch.as_tensor(self.now))


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("buffer", "net.size"), ("tensor", "net.size"), ("number", "net.size"), ("rebound", "net.size"),
        ("array", "net.size"), ("list", r"net.kept\['sizes'\]\[0\]"),
    ],
)  # fmt: skip
def test_unlisted_state_that_training_changes_is_refused(where: str, name: str) -> None:
    t, steps = tiny("mlp"), []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Whitened(where)

        def forward(self, x: Tensor) -> Tensor:
            steps.append(1)
            return self.net(x)

    with pytest.raises(RefusedError, match=f"{name}: a forward in training changes it.*persistent"):
        run(Counting(), Finetune(epochs=50), t.task)
    assert len(steps) < 20, "the refusal must come before the training"


class Growing(nn.Module):
    """Returns one tensor more after a forward in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.trained = tiny("mlp").model, False

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        answers = (self.body(x),) * (2 if self.trained else 1)
        self.trained = self.trained or self.training
        return answers


def tuned_of(model: nn.Module) -> TrainableForms:
    state = start(model)
    assert state.given is not None
    return TrainableForms(state.given, state.forms, state.sites, list(state.sites))


def test_another_number_of_outputs_is_a_difference() -> None:
    with pytest.raises(RefusedError, match="trained: a forward in training changes it"):
        check_unlisted(tuned_of(Growing()), tiny("mlp").task)


def test_an_error_of_the_search_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bool:
        raise TypeError("broken")

    monkeypatch.setattr(hidden_state, "alike", broken)
    with pytest.raises(TypeError, match="broken"):
        check_unlisted(tuned_of(Whitened("number")), tiny("mlp").task)


def test_persistent_buffers_are_trained_and_kept() -> None:
    t = tiny("mlp")
    result = run(Whitened("persistent"), Finetune(epochs=1), t.task)
    assert result.forms["size"].decode() != 1
    assert result.model().size == result.forms["size"].decode()


def test_steps_without_training_do_not_check() -> None:
    t = tiny("mlp")
    assert run(Whitened("buffer"), Measure(), t.task).ledger.count == 1


class Odd(nn.Module):
    """A module with unlisted state that its outputs do not depend on."""

    def __init__(self, keeps: Callable[["Odd", Tensor], None]) -> None:
        super().__init__()
        self.keeps, self.body = keeps, tiny("mlp").model
        self.register_buffer("table", torch.arange(5.0) + 1, persistent=False)
        self.register_buffer("cached", torch.ones(1), persistent=False)
        self.plain, self.count, self.seen = torch.ones(5), 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.keeps(self, x)
        return self.body(x * self.table / self.plain)


def last(net: Odd, x: Tensor) -> None:
    net.seen = x * 2  # activations stored for later inspection


def counted(net: Odd, x: Tensor) -> None:
    net.count += 1


def longer(net: Odd, x: Tensor) -> None:
    net.register_buffer("cached", torch.arange(float(len(x))), persistent=False)


def nothing(net: Odd, x: Tensor) -> None:
    pass


@pytest.mark.parametrize("keeps", [nothing, last, counted, longer])
def test_tables_and_stored_activations_are_accepted(keeps: Any) -> None:
    t = tiny("mlp")
    result = run(Odd(keeps), Finetune(epochs=2, lr=0.01), t.task)
    assert result.digest != result.ledger.base
    assert torch.equal(t.out(result.model()), t.out(result.model()))


@pytest.mark.parametrize("name", ["mlp", "conv", "attention", "lstm", "mixed"])
def test_layers_of_torch_are_accepted(name: str) -> None:
    t = tiny(name)
    assert run(t.model, Finetune(epochs=1), t.task).ledger.count == 1


def test_the_given_model_is_not_changed() -> None:
    t, net = tiny("mlp"), Whitened("buffer")
    with pytest.raises(RefusedError):
        run(net.train(), Finetune(epochs=1), t.task)
    assert net.size == 1
