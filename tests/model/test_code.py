"""Code: the digest changes with the code, and parts without Python code are listed."""

import functools
import operator
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.model.code import code_of, settings_of
from tersor.model.metric import Metric
from tersor.model.task import Task

EVALUATE = [(torch.zeros(1, 1), torch.zeros(1))]


def net(body: str, more: str = "", head: str = "forward(self, x)") -> nn.Module:
    """An instance of the class that this text defines."""
    found: dict[str, Any] = {"nn": nn, "__name__": "mine"}
    exec(f"{more}\nclass Net(nn.Module):\n    def {head}:\n        {body}\n", found)  # noqa: S102
    return found["Net"]()


def code(model: nn.Module | None = None, **parts: Any) -> str:
    return code_of(model, Task(evaluate=EVALUATE, **parts) if parts else None)[0]


# A replacement for "return x + 1", and whether the digest changes.
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


# Two texts of one method that differ only in a name or a number.
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


def test_parts_without_code_are_listed() -> None:
    task = Task(evaluate=EVALUATE, target=operator.itemgetter(1))
    assert code_of(None, task)[1] == ["task: target"]
    assert code_of(net("return x"), Task(evaluate=EVALUATE))[1] == []


def walking(model: nn.Module) -> nn.Module:
    """A model with a forward wrapped by functions that refer to each other, as library decorators do."""

    def one(x: Any, n: int = 2) -> Any:
        return x if n == 0 else other(x, n)

    def other(x: Any, n: int) -> Any:
        return one(x, n - 1)

    type(model).forward = lambda self, x: one(x)
    return model


def test_functions_that_refer_to_themselves_are_visited_once() -> None:
    assert code(walking(net("return x"))) == code(walking(net("return x"))) != code(net("return x"))


def later(function: Callable[[], Any]) -> Any:
    return lambda output, target: function()  # noqa: PLW0108 (the closure is what is tested)


def test_an_empty_closure_is_no_error() -> None:
    loss, cell = later(code), types.CellType()
    loss = types.FunctionType(loss.__code__, {}, "loss", None, (cell,))
    assert code(loss=loss)


def test_classes_with_one_name_have_a_fixed_order() -> None:
    """The order of a set of classes depends on their addresses, which differ between processes."""
    models = [net(f"return x + {n}") for n in range(6)]
    assert len({code(nn.Sequential(*(models[(i + k) % 6] for i in range(6)))) for k in range(6)}) == 1
    places = [code(nn.Sequential(*(net(f"return x + {n}") for n in range(6)))) for _ in range(6)]
    assert set(places) == {code(nn.Sequential(*models))}


class Held:
    """An object whose repr contains its address."""


def test_objects_count_by_their_class() -> None:
    for make in (
        lambda: functools.partial(added, held=Held()), lambda: functools.partial(added, Held(), 1),
        lambda: functools.partial(added, held={"a": [Held()]}),
    ):  # fmt: skip
        assert code(loss=make()) == code(loss=make())
        assert code_of(None, Task(evaluate=EVALUATE, loss=make()))[1] == ["task: loss"]
    defaults = [types.FunctionType(added.__code__, {}, "loss", ((Held(),),)) for _ in range(2)]
    assert code(loss=defaults[0]) == code(loss=defaults[1])


def sized(**settings: Any) -> nn.Module:
    """Layers with settings, and one with a number, a function and a buffer that no state dict lists."""
    given = {"stride": 1, "eps": 1e-5, "slope": 0.01, "scale": 1.0, "act": F.relu, "table": 1.0} | settings
    layer = net("return x")
    layer.scale, layer.act = given["scale"], given["act"]
    layer.register_buffer("table", torch.full((3,), given["table"]), persistent=False)
    conv = nn.Conv2d(1, 2, 3, stride=given["stride"], padding_mode=given.get("padding_mode", "zeros"))
    norm, drop = nn.BatchNorm2d(2, eps=given["eps"]), nn.Dropout(given.get("p", 0.5))
    return nn.Sequential(conv, norm, nn.LeakyReLU(given["slope"]), drop, layer)


OTHER: dict[str, Any] = {
    "stride": 2, "eps": 1e-3, "slope": 1.5, "scale": 2.0, "act": F.silu, "table": 2.0,
    "padding_mode": "reflect", "p": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER)
def test_settings_of_modules_count(what: str) -> None:
    """None of these settings is in the state dict or in the code of a class."""
    assert settings_of(sized()) == settings_of(sized()) != settings_of(sized(**{what: OTHER[what]}))


def test_the_order_of_layers_counts_and_modes_do_not() -> None:
    layers = (nn.Tanh(), nn.ReLU())
    assert settings_of(nn.Sequential(*layers)) != settings_of(nn.Sequential(*reversed(layers)))
    assert settings_of(sized().eval()) == settings_of(sized().train())


CALLS = "def act(x):\n    return helper(x)\ndef helper(x):\n    return x * FACTOR"


def test_what_is_frozen_counts() -> None:
    """A run that trains on with other tensors frozen would be neither of the two runs."""
    partly = sized()
    next(partly.parameters()).requires_grad_(False)
    assert settings_of(partly) != settings_of(sized())
    assert settings_of(sized().requires_grad_(False)) not in (settings_of(sized()), settings_of(partly))
    mixed = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    plain = settings_of(mixed)
    mixed[0].eval()
    assert settings_of(mixed) != plain == settings_of(mixed.eval())


def test_hooks_of_modules_count() -> None:
    def twice(module: nn.Module, args: object, out: Tensor) -> Tensor:
        return out * 2

    def thrice(module: nn.Module, args: object, out: Tensor) -> Tensor:
        return out * 3

    found = set()
    for hook in (None, twice, thrice):
        layer = nn.Linear(3, 3)
        if hook is not None:
            layer.register_forward_hook(hook)
        found.add(settings_of(nn.Sequential(layer)))
    assert len(found) == 3


def test_functions_that_own_code_calls_count() -> None:
    """A helper of the user's module, its callees and constants count; functions that nobody calls do not."""

    def model(more: str) -> nn.Module:
        return net("return act(x)", more=more)

    given = code(model(f"FACTOR = 1\n{CALLS}"))
    assert given == code(model(f"FACTOR = 1\n{CALLS}\ndef unused():\n    return 3"))
    assert given != code(model(f"FACTOR = 2\n{CALLS}"))
    assert given != code(model(f"FACTOR = 1\n{CALLS.replace('x *', 'x +')}"))


def test_the_code_of_a_custom_step_counts() -> None:
    def step(keep: float) -> Any:
        found: dict[str, Any] = {"__name__": "mine"}
        exec(f"class Mine:\n    def run(self, view):\n        yield {keep}", found)  # noqa: S102
        return found["Mine"]()

    one, same, other = (code_of(None, None, [step(keep)])[0] for keep in (0.5, 0.5, 0.7))
    assert one == same != other


def test_logits_and_set_metrics_count() -> None:
    def metric(text: str, value: str = "sums[0]", **more: Any) -> Metric:
        found: dict[str, Any] = {"__name__": "mine"}
        exec(f"def f(output, target):\n    return {text}\ndef g(sums):\n    return {value}", found)  # noqa: S102
        return Metric("m", statistics=found["f"], value=found["g"], **more)

    def logits(text: str) -> Callable[[Any], Any]:
        found: dict[str, Any] = {"__name__": "mine"}
        exec(f"def f(output):\n    return {text}", found)  # noqa: S102
        return found["f"]

    metrics = [
        metric("output"), metric("output + 1"), metric("output", "sums[1]"), metric("output", better="lower"),
        metric("output", percent=True), "perplexity", "mean_iou",
    ]  # fmt: skip
    assert len({code(metric=each) for each in metrics}) == len(metrics)
    assert code(metric=metric("output")) == code(metric=metric("output"))
    ways = [None, "classes", "binary", logits("output[0]"), logits("output[1]")]
    assert len({code(logits=each, metric="accuracy") for each in ways}) == len(ways)
    assert code(logits=logits("output[0]")) == code(logits=logits("output[0]"))
