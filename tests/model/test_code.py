"""Code: the digest follows what the code does, and names what cannot be looked at."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.model.code import code_of
from tersor.model.task import Task

EVALUATE = [(torch.zeros(1, 1), torch.zeros(1))]


def net(body: str, more: str = "", head: str = "forward(self, x)") -> nn.Module:
    """An instance of a class that this text defines."""
    found: dict[str, Any] = {"nn": nn, "__name__": "mine"}
    exec(f"{more}\nclass Net(nn.Module):\n    def {head}:\n        {body}\n", found)  # noqa: S102
    return found["Net"]()


def code(model: nn.Module | None = None, **parts: Any) -> str:
    return code_of(model, Task(evaluate=EVALUATE, **parts) if parts else None)[0]


# What becomes of "return x + 1", and whether the digest follows.
MODELS: dict[str, tuple[nn.Module, bool]] = {
    "another constant": (net("return x + 2"), True),
    "another operation": (net("return x - 1"), True),
    "another name": (net("return x.relu() + 1"), True),
    "another default": (net("return x + 1", head="forward(self, x, y=0)"), True),
    "another default by name": (net("return x + 1", head="forward(self, x, *, y=0)"), True),
    "one more method": (net("return x + 1\n    def other(self):\n        pass"), True),
    "a comment": (net("return x + 1  # one more"), False),
    "its place in the file": (net("return x + 1", more="\n\n"), False),
}


@pytest.mark.parametrize("what", MODELS)
def test_the_methods_of_a_model_count(what: str) -> None:
    model, follows = MODELS[what]
    assert (code(model) != code(net("return x + 1"))) == follows
    assert (
        code(nn.Sequential(nn.ReLU(), model)) != code(nn.Sequential(nn.ReLU(), net("return x + 1")))
    ) == follows


# Two texts of one method, which differ in nothing but a name or a number.
METHODS = {
    "a name": ("return x.relu()", "return x.tanh()"),
    **{
        what: tuple(f"pass\n    f = {text.format(number)}" for number in (1, 2))
        for what, text in {
            "a default by name": "lambda self, *, y={}: y",
            "a static method": "staticmethod(lambda x: x + {})",
            "a class method": "classmethod(lambda cls: {})",
            "a property": "property(lambda self: {})",
            "what sets a property": "property(None, lambda self, value: {})",
        }.items()
    },
}


@pytest.mark.parametrize("what", METHODS)
def test_every_kind_of_method_counts(what: str) -> None:
    one, other = METHODS[what]
    assert code(net(one)) == code(net(one)) != code(net(other))


def test_the_methods_of_parents_count() -> None:
    def child(parent: nn.Module) -> nn.Module:
        return type("Child", (type(parent),), {"__module__": "mine"})()

    assert code(child(net("return x + 1"))) == code(child(net("return x + 1")))
    assert code(child(net("return x + 1"))) != code(child(net("return x + 2")))


def added(most: float) -> Callable[[Any, Any], Any]:
    """A loss whose closure holds a function."""

    def clip(loss: Any) -> Any:
        return loss.clamp(max=1.0) if most == 1 else loss.clamp(max=2.0)

    def other(loss: Any) -> Any:
        return loss * 2

    inner = clip if most < 3 else other
    return lambda output, target: inner(F.mse_loss(output, target))


def test_functions_of_the_task_count() -> None:
    losses = [
        added(1), added(3), F.mse_loss, F.l1_loss, functools.partial(F.mse_loss, reduction="sum"),
        functools.partial(F.l1_loss, reduction="sum"), lambda output, target: (output - target).sum(),
    ]  # fmt: skip
    found = [code(loss=loss) for loss in losses]
    assert len(set(found)) == len(found)
    assert found == [code(loss=loss) for loss in losses]
    assert len({code(metric=metric) for metric in ("accuracy", losses[-1])}) == 2
    assert len({code(**{part: losses[-1]}) for part in ("loss", "metric", "feed", "target")}) == 4


def test_what_has_no_code_is_named() -> None:
    task = Task(evaluate=EVALUATE, target=operator.itemgetter(1))
    assert code_of(None, task)[1] == ["task: target"]
    assert code_of(net("return x"), Task(evaluate=EVALUATE))[1] == []
