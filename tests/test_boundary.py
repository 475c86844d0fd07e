"""Boundary: what public calls raise is ours with the original as its cause, or the user's own as it was."""

import copy
import importlib
import inspect
import pickle
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import tersor
from tersor import boundary, errors
from tersor.model.scaled_inputs import ScaledInputs
from tersor.steps import quantize

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
STEPS = [tersor.Prune(keep=0.5, per="tensor", where="0.weight"), tersor.Quantize(bits=4), tersor.Entropy()]
Call = Callable[[], object]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def task(**more: Any) -> tersor.Task:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    batches = [(x[:16], x[:16, :4].argmax(1)), (x[16:], x[16:, :4].argmax(1))]
    return tersor.Task("largest of four", evaluate=batches, calibrate=batches, train=batches, **more)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tersor.State:
    """A result, and files of every kind in the current folder: a.tersor, b.tersor, p.patch, w.safetensors."""
    monkeypatch.chdir(tmp_path)
    first = tersor.run(net(), STEPS, journal="journal")
    tersor.save(first, "a.tersor")
    tersor.save(tersor.run(net(), STEPS), "b.tersor")
    tersor.diff("a.tersor", "b.tersor", "p.patch")
    safetensors.torch.save_file(net().state_dict(), "w.safetensors")
    return first


# ---- faults of ours ---------------------------------------------------------------------------------------

# The call, what is taken out of our code beneath it (None is not callable), and whether a site is at fault.
FAULTS: dict[str, tuple[Callable[[tersor.State], object], str, str, bool]] = {
    "run": (lambda s: tersor.run(net(), STEPS), "steps.quantize", "uniform_grid", True),
    "save": (lambda s: tersor.save(s, "c.tersor"), "io.container_writer", "structure", True),
    "load": (lambda s: tersor.load("a.tersor"), "io.container", "TersorFile", False),
    "pack": (lambda s: tersor.pack("w.safetensors", "c.tersor", recipe()), "io.pack", "is_finite", True),
    "unpack": (lambda s: tersor.unpack("a.tersor", "u.safetensors"), "io.unpack", "TersorFile", False),
    "diff": (lambda s: tersor.diff("a.tersor", "b.tersor", "q.patch"), "io.patch.diff", "output", False),
    "patch": (lambda s: tersor.patch("a.tersor", "p.patch", "c.tersor"), "io.patch.patch", "output", False),
    "verify": (lambda s: tersor.verify("a.tersor"), "io.verify", "TersorFile", False),
    "undo": (lambda s: tersor.undo(s, 1, journal="journal"), "core.history", "rebuilt", False),
    "replay": (lambda s: tersor.replay(s.given, s.ledger, "journal"), "core.history", "rebuilt", False),
    "trainable": (tersor.trainable, "steps.own_training", "Trainable", False),
    "State.plain": (lambda s: s.model(), "core.state", "write_module", False),
    "State.on": (lambda s: tersor.load("a.tersor").on(net()), "core.state", "start", False),
}


def recipe() -> tersor.Recipe:
    return tersor.Recipe(tuple(STEPS))


@pytest.mark.parametrize("who", FAULTS)
def test_a_fault_of_ours_is_an_error_of_ours(
    made: tersor.State, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    call, module, name, at_site = FAULTS[who]
    importlib.import_module(f"tersor.{module}")
    monkeypatch.setattr(sys.modules[f"tersor.{module}"], name, None)
    with pytest.raises(tersor.InternalError) as caught:
        call(made)
    said, cause = str(caught.value), caught.value.__cause__
    assert isinstance(cause, TypeError)
    assert said.startswith(f"{who}: ")
    assert "TypeError: 'NoneType' object" in said
    assert "not in what you gave" in said
    assert f"tersor {tersor.__version__}, torch {torch.__version__}" in said
    assert any(f"at {site}: " in said for site in NAMES) is at_site
    assert "The above exception was the direct cause" in "".join(traceback.format_exception(caught.value))


def test_a_fault_names_the_step_the_site_and_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "uniform_grid", None)
    with pytest.raises(tersor.InternalError, match=r"^run: step 2 quantize, at 0\.weight: ") as caught:
        tersor.run(net(), STEPS)
    assert str(caught.value).endswith("; recipe: prune where=0.weight per=tensor, quantize bits=4, entropy")


def test_a_fault_in_a_thread_has_its_site(made: tersor.State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["tersor.io.pack"], "is_finite", None)
    with pytest.raises(tersor.InternalError, match=r"at 0\.(bias|weight): "):
        tersor.pack("w.safetensors", "c.tersor", recipe(), workers=2)
    assert not Path("c.tersor").exists()


def test_an_error_of_the_system_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all places that touch the disk convert their errors."""
    monkeypatch.setattr(quantize, "uniform_grid", lambda *_, **__: open("/nosuch/file"))  # noqa: SIM115
    monkeypatch.setitem(globals(), "__name__", "tersor.elsewhere")  # as if the line above were ours
    with pytest.raises(tersor.StorageError, match=r"run: step 2 quantize.*No such file") as caught:
        tersor.run(net(), STEPS)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit])
def test_what_is_no_fault_passes(monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]) -> None:
    def stop(*_: object, **__: object) -> None:
        raise kind("now")

    monkeypatch.setattr(quantize, "uniform_grid", stop)
    monkeypatch.setitem(globals(), "__name__", "tersor.elsewhere")
    with pytest.raises(kind, match="now"):
        tersor.run(net(), STEPS)


def test_no_memory_of_torch_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "uniform_grid", lambda *_, **__: torch.empty(2**60))
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        tersor.run(net(), STEPS)
    assert not isinstance(caught.value, errors.TersorError)


# ---- errors of the user's code ----------------------------------------------------------------------------


class Failing(nn.Module):
    """Its forward fails at the n-th call in training."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.body, self.at, self.calls = nn.Linear(8, 4), at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls > self.at:
            raise ZeroDivisionError("in forward")
        return self.body(x)


class Mine(Exception):
    pass


def loss_that_fails(after: int) -> Callable[[Any, Any], Tensor]:
    calls = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > after:
            raise Mine("in the loss")
        return nn.functional.cross_entropy(output, target)

    return loss


class Data(torch.utils.data.Dataset):
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.fails and index > 5:
            raise Mine("in the data")
        return torch.ones(8), index % 4


def in_data(workers: int) -> object:
    loader = torch.utils.data.DataLoader(Data(True), batch_size=2, num_workers=workers)
    return tersor.run(net(), tersor.Finetune(epochs=1), task_of(loader))


def task_of(loader: Any) -> tersor.Task:
    return tersor.Task("data", evaluate=loader, train=loader)


THEIRS: dict[str, tuple[Call, type[Exception], str]] = {
    "loss": (
        lambda: tersor.run(net(), tersor.Finetune(epochs=2), task(loss=loss_that_fails(3))), Mine,
        "in the loss",
    ),
    "model": (
        lambda: tersor.run(Failing(2), tersor.Finetune(epochs=2), task()), ZeroDivisionError, "in forward"
    ),
    "data": (lambda: in_data(0), Mine, "in the data"),
    "data of workers": (lambda: in_data(1), Mine, "in the data"),
}  # fmt: skip


@pytest.mark.parametrize("where", THEIRS)
def test_an_error_of_the_users_code_keeps_its_type_and_its_place(where: str) -> None:
    call, kind, text = THEIRS[where]
    with pytest.raises(kind, match=text) as caught:
        call()
    assert type(caught.value) is kind
    page = "".join(traceback.format_exception(caught.value))
    assert f'raise {kind.__name__}("{text}")' in page
    (note,) = caught.value.__notes__
    assert note.startswith("run: your code raised it")
    assert "while step 1 finetune ran it" in note
    if "workers" not in where:
        assert "test_boundary.py, line" in note


def test_an_error_of_a_layer_of_torch_is_the_users_too() -> None:
    """Only torch's frames follow ours then. A function of torch that we call alone is ours."""
    ours = {"__name__": "tersor.elsewhere", "torch": torch, "net": net()}
    exec("def forward(x): net(x)\ndef product(x): x @ x", ours)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught, boundary.bounded("x"):
        ours["forward"](torch.ones(2, 3))
    assert caught.value.__notes__[0].startswith("x: your code raised it")
    with pytest.raises(tersor.InternalError, match="^x: RuntimeError"), boundary.bounded("x"):
        ours["product"](torch.ones(2, 3))


@pytest.mark.parametrize("where", ["loss", "model"])
def test_no_memory_in_the_users_code_is_not_called_a_misfit(where: str) -> None:
    def much(output: Any, target: Any) -> Tensor:
        return torch.empty(2**60).sum() + output.sum()

    class Much(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (torch.empty(2**60) if self.training else 0)

    given, model = (task(loss=much), net()) if where == "loss" else (task(), Much(8, 4))
    with pytest.raises(RuntimeError, match="allocate memory"):
        tersor.run(model, tersor.Finetune(epochs=1), given)


# ---- arguments and kinds of models ------------------------------------------------------------------------

WRONG: dict[str, tuple[Call, str]] = {
    "save a module": (
        lambda: tersor.save(net(), "x"),
        r"result is a Sequential, but it is a state.*For a model: save\(run\(model, steps\), 'model",
    ),
    "save weights": (lambda: tersor.save(net().state_dict(), "x"), "save: result is a OrderedDict"),
    "save swapped": (lambda: tersor.save("x", net()), "save: result is 'x', but it is a state"),
    "load a module": (lambda: tersor.load(net()), "load: path is a Sequential, but it is the path of a file"),
    "load nothing": (lambda: tersor.load(None), "load: path is None"),
    "pack a module": (lambda: tersor.pack(net(), "x", recipe()), "For a model in memory: save"),
    "no task": (lambda: tersor.run(net(), STEPS, [1, 2]), "run: task is a list, but it is a tersor.Task"),
    "a class": (lambda: tersor.trainable(tersor.State), "trainable: state is a type"),
    "a task's class": (lambda: tersor.run(net(), STEPS, tersor.Task), "task is a type, but it is"),
    "given": (lambda: tersor.run(net(), STEPS).model("x"), "State.model: given is 'x', but it is a torch.nn"),
    "example": (
        lambda: tersor.trainable(tersor.run(net(), STEPS), example=torch.ones(2, 8)),
        "trainable: example is a Tensor, but it is a function of the model",
    ),
    "limit": (lambda: tersor.load("x", limit="much"), "load: limit is 'much', but it is a whole number"),
    "half a thread": (
        lambda: tersor.unpack("x", "y", workers=1.5),
        "workers is 1.5, but it is a whole number",
    ),
    "only": (lambda: tersor.unpack("x", "y", only=3), "only is 3, but it is a text, or a list of them"),
    "key": (lambda: tersor.pack("x", "y", key=3), "pack: key is 3, but it is a text"),
    "seed": (lambda: tersor.run(net(), STEPS, seed="one"), "run: seed is 'one', but it is a whole number"),
    "observer": (lambda: tersor.diff("x", "y", "z", observer=print), "observer is a .*but it is an Observer"),
    "undo": (lambda: tersor.undo(tersor.run(net(), STEPS), "all"), "undo: steps is 'all', but it is a whole"),
    "ledger": (
        lambda: tersor.replay(net(), "ledger", "x"),
        "ledger is 'ledger', but it is a ledger, such as",
    ),
    "journal": (lambda: tersor.replay(net(), tersor.Ledger(""), 3), "journal is 3, but it is the folder"),
    "journal of run": (
        lambda: tersor.run(net(), STEPS, journal=3),
        "journal is 3, but it is the path of a f",
    ),
    "epochs": (
        lambda: tersor.compress(net(), task(), "drop<=1", "x", epochs="3"),
        "epochs is '3', but it is a",
    ),
    "no task at all": (
        lambda: tersor.compress(net(), None, "drop<=1", "x"),
        "task is None, but it is a tersor",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_argument_of_another_kind_is_named(what: str) -> None:
    call, says = WRONG[what]
    with pytest.raises(tersor.SettingError, match=says):
        call()


def test_a_wrong_call_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'path'"):
        tersor.load()
    with pytest.raises(TypeError, match="unexpected keyword argument 'bit'"):
        tersor.load("x", bit=1)


class Holding(nn.Module):
    def __init__(self, thing: object) -> None:
        super().__init__()
        self.body, self.thing = nn.Linear(8, 4), thing


class Outside(Tensor):
    """Its values are in another tensor, as those of DTensor are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{func}")


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: object) -> Any:
        raise ZeroDivisionError("no copies")


def with_buffer(value: Tensor) -> nn.Module:
    found = net()
    found.register_buffer("more", value)
    return found


def outside() -> nn.Module:
    found = nn.Linear(8, 4)
    found.weight = nn.Parameter(Outside(torch.ones(4, 8)))
    return found


def quantized() -> nn.Module:
    found = net()
    found[0] = torch.ao.nn.quantized.Linear(8, 16)
    return found


MODELS: dict[str, tuple[Call, str]] = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8)), r"0\.weight.*a lazy tensor.*Run a batch through"),
    "meta": (lambda: nn.Linear(8, 4, device="meta"), "weight.*a meta tensor"),
    "expanded": (lambda: with_buffer(torch.ones(1, 4).expand(8, 4)), "more: some of its elements share"),
    "wrapper": (outside, "weight.*holds a Outside, a class of tensors that holds its values elsewhere"),
    "quantized tensor": (
        lambda: with_buffer(torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)),
        "more.*a quantized tensor",
    ),
    "quantized layer": (quantized, "0: a quantized Linear of torch.ao"),
    "lock": (lambda: Holding(threading.Lock()), "cannot be copied.*: thing is a lock: TypeError"),
    "generator": (lambda: Holding(i for i in range(3)), "thing is a generator"),
    "file": (lambda: Holding(open(__file__)), "thing is a TextIOWrapper"),  # noqa: SIM115
    "inside": (lambda: nn.Sequential(Holding([threading.Lock()])), r"0\.thing is a list"),
    "deepcopy": (lambda: Uncopied(8, 4), "cannot be copied.*ZeroDivisionError: no copies"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_cannot_be_stored_is_refused_by_name(what: str) -> None:
    make, says = MODELS[what]
    with pytest.raises(tersor.RefusedError, match=says):
        tersor.run(make(), tersor.Quantize())  # type: ignore[arg-type]


def test_a_file_fills_a_model_without_memory(made: tersor.State) -> None:
    """As made under torch.device("meta"). A buffer that no file holds would stay without values."""
    found = tersor.load("a.tersor").model(net().to("meta"))
    expected = made.model()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())
    assert {p.device.type for p in found.parameters()} == {"cpu"}
    bare = net()
    bare.register_buffer("more", torch.ones(3), persistent=False)
    with pytest.raises(tersor.RefusedError, match=r"^more: it is on the meta device, and no file holds it"):
        tersor.load("a.tersor").model(bare.to("meta"))


def test_a_batch_without_values() -> None:
    x, y = torch.ones(4, 8, device="meta"), torch.zeros(4, dtype=torch.int64)
    given = tersor.Task("meta", evaluate=[(x, y)], calibrate=[(x, y)])
    with pytest.raises(tersor.TaskError, match="a batch holds a tensor on the meta device"):
        tersor.run(net(), tersor.Quantize(activations=8), given)


@pytest.mark.parametrize("name", ["nope", "0.weigt", ""])
def test_an_unknown_weight_of_a_state(made: tersor.State, name: str) -> None:
    for call in (lambda: made.shape(name), lambda: made.present(name, 0)):
        with pytest.raises(tersor.SiteError, match=r"no weight '.*Allowed: 0\.bias, 0\.weight"):
            call()
    with pytest.raises(tersor.SettingError, match=r"0\.weight: axis=2, but its axes are 0 to 1"):
        made.present("0.weight", 2)


@pytest.mark.parametrize(
    ("scaled", "says"), [(False, "shapes cannot be multiplied"), (True, "The size of tensor a")]
)
def test_an_example_that_does_not_fit_is_the_users(scaled: bool, says: str) -> None:
    """torch passes through our code between the user's layer and its operator, and through layers of ours."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 100  # smoothing gives the first layer factors for its inputs
    model = net()
    with torch.no_grad():
        model[0].get_parameter("weight")[:, 0] /= 100
    given = tersor.Task("outliers", evaluate=[(x, x[:, :4].argmax(1))], calibrate=[(x,)])
    state = tersor.run(model, tersor.Quantize(activations=8, smooth=scaled), given)
    assert any(isinstance(layer, ScaledInputs) for layer in state.model().modules()) == scaled
    with pytest.raises(RuntimeError, match=says) as caught:
        tersor.trainable(state, example=lambda model: model(torch.ones(2, 3)))
    assert caught.value.__notes__[0].startswith("trainable: your code raised it (test_boundary.py, line")


def test_a_function_in_a_model_is_no_obstacle() -> None:
    assert tersor.run(Holding(lambda x: x), tersor.Quantize()).sites


# ---- the table --------------------------------------------------------------------------------------------


def test_every_public_function_is_an_entrance() -> None:
    functions = {name for name in tersor.HOMES if inspect.isfunction(getattr(tersor, name))}
    assert functions == tersor.ENTRANCES


@pytest.mark.parametrize("name", sorted(tersor.ENTRANCES))
def test_an_entrance_keeps_its_name_and_signature(name: str) -> None:
    guarded = getattr(tersor, name)
    assert pickle.loads(pickle.dumps(guarded)) is guarded
    assert copy.copy(guarded) is guarded
    assert inspect.signature(guarded) == inspect.signature(guarded.__wrapped__)
    assert guarded.__doc__ == guarded.__wrapped__.__doc__


# Annotations that no attribute tells, of arguments that are checked where they are used.
ELSEWHERE = {
    "nn.Module | State", "Budget | str", "bool", "Paths", "Given", "Recipe | Iterable[Any] | Any", "str",
    "int | str | None",
}  # fmt: skip


def test_every_argument_is_checked_somewhere() -> None:
    found = {
        str(parameter.annotation)
        for name in tersor.ENTRANCES
        for parameter in inspect.signature(getattr(tersor, name)).parameters.values()
    }
    assert found - boundary.KINDS.keys() == ELSEWHERE


def test_the_kinds_are_those_of_the_annotations() -> None:
    """A file or a state as an argument is annotated in one of the ways that are checked."""
    for name in tersor.ENTRANCES:
        for parameter in inspect.signature(getattr(tersor, name)).parameters.values():
            if "PathLike" in str(parameter.annotation) or parameter.annotation in ("State", State):
                assert parameter.annotation in boundary.KINDS, (name, parameter)


State = tersor.State
