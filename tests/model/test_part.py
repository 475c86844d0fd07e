"""Parts: inputs that forward hooks see, names of the whole model, and refusals that say what to name."""

import copy

import pytest
import torch
from detector import Detector, batches, detector, task
from torch import Tensor, nn

import tersor
from tersor.errors import RefusedError, TaskError
from tersor.model.edges import edges_of
from tersor.model.example import example_inputs
from tersor.model.graph import traced
from tersor.model.outputs import tensors_of
from tersor.model.part import alone, check_parts, naming_parts, part_task, possible_parts


def seen(net: nn.Module, path: str, images: object) -> tuple[tuple, dict, object]:
    """What a plain forward hook sees of one module: (args, kwargs, output)."""
    found: list = []
    handle = net.get_submodule(path).register_forward_hook(
        lambda _, args, kwargs, out: found.append((args, kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        net(images)
    handle.remove()
    (only,) = found
    return only


@pytest.mark.parametrize("path", ["backbone", "head", "backbone.blocks.1"])
def test_a_part_alone_gives_what_it_gives_in_the_whole_model(path: str) -> None:
    net = detector()
    part, its = alone(net, (path,)), part_task(task(path), net, (path,))
    every = batches(8, seed=3)[2:6]
    for batch, (images, _) in zip(its.batches("calibrate"), every, strict=True):
        args, kwargs, out = seen(net, path, images)
        given = zip(tensors_of(batch), tensors_of((args, kwargs)), strict=True)
        assert all(torch.equal(a, b) for a, b in given)
        got = list(tensors_of(its.run(part, batch)))
        assert all(torch.equal(a, b) for a, b in zip(got, tensors_of(out), strict=True))


def test_the_graph_of_a_part_has_the_names_of_the_whole_model() -> None:
    net = detector()
    part, its = alone(net, ("backbone",)), part_task(task(), net, ("backbone",))
    graph = traced(part, example_inputs(its, part))
    read = set(graph.tensors.values()) - graph.unread
    assert "backbone.blocks.1.two.weight" in read
    assert not any(name.startswith("head") for name in read)
    images = batches(1)[0][0]
    inside = {name for name in edges_of(net, images) if name.startswith("backbone")}
    assert {name for name in graph.edges if "blocks" in name} <= inside


def test_the_whole_model_and_its_modes_stay_as_they_were() -> None:
    net = detector().train()
    before = copy.deepcopy(net.state_dict())
    its = part_task(task(), net, ("backbone",))
    list(its.batches("calibrate"))
    alone(net, ("backbone",))
    assert net.training
    assert "forward" not in vars(net)
    assert not net.backbone._forward_pre_hooks
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_inputs_are_kept_for_a_second_pass() -> None:
    net, calls = detector(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    its = part_task(task(), net, ("backbone",))
    first = [x.clone() for x in tensors_of(list(its.batches("calibrate")))]
    count = len(calls)
    assert count == 4
    again = list(tensors_of(list(its.batches("calibrate"))))
    assert len(calls) == count
    assert all(map(torch.equal, first, again))


def test_several_parts_run_side_by_side() -> None:
    net, names = detector(), ("backbone", "head")
    part, its = alone(net, names), part_task(task(names), net, names)
    (batch, *_), (images, _) = its.batches("calibrate"), batches(8, seed=3)[2]
    wanted = [seen(net, path, images)[2] for path in names]
    got = list(tensors_of(its.run(part, batch)))
    assert all(torch.equal(a, b) for a, b in zip(got, tensors_of(wanted), strict=True))
    graph = traced(part, example_inputs(its, part))
    assert {"backbone.stem.weight", "head.box.weight"} <= set(graph.tensors.values()) - graph.unread


class Twice(nn.Module):
    """Calls its layer twice, reads a weight of `inner` outside of it, and never calls `idle`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner, self.empty = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(x))
        return self.empty(self.inner(x)) @ self.inner[0].weight


def simple(part: object) -> tersor.Task:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    return tersor.Task("simple", evaluate=[(x, torch.zeros(6, dtype=torch.int64))], part=part)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("layr", "no such module.*layer"),
        ("idle", "does not call its part idle"),
        ("empty", "has no parameters"),
        (("inner", "inner.0"), "inner.0 is inside of the part inner"),
        ("inner", "inner.0.weight is in the part inner, and .*matmul.* reads it outside"),
        (("layer", "inner"), "calls layer 2 times"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_the_run(part: object, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        tersor.run(Twice(), tersor.Prune(), simple(part))


@pytest.mark.parametrize("part", [3, "", (), ("a", "a"), ("a", 3)])
def test_what_is_no_path_is_refused_by_the_task(part: object) -> None:
    with pytest.raises(TaskError, match="path of a module"):
        simple(part)


def test_a_layer_that_is_called_twice_gives_two_batches() -> None:
    net = Twice()
    check_parts(net, simple("layer"))
    x = simple("layer").evaluate[0][0]
    first, second = part_task(simple("layer"), net, ("layer",)).batches("evaluate")
    assert torch.equal(first[0][0], x)
    assert torch.equal(second[0][0], net.layer(x))


class Body(nn.Sequential):
    """Keeps what its first layer gave, its output in a dict, and a complex number."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.kept = {"middle": self[0](x)}
        self.kept["out"] = self[2](self[1](self.kept["middle"] * 1))
        return {"x": self.kept["out"], "z": torch.complex(self.kept["out"], x), "given": x.add_(0)}


class Carrying(nn.Module):
    def __init__(self, read: str) -> None:
        super().__init__()
        self.body, self.read = Body(), read
        self.again, self.hooked = self.body, list[Tensor]()
        self.body[0].register_forward_hook(lambda *given: self.hooked.append(given[-1]))

    def forward(self, x: Tensor) -> Tensor:
        self.hooked.clear()
        y = self.body(x * 1)
        y = y["x"] + y["z"].real + y["given"]
        if self.read == "hook":
            y = y + self.hooked[0].mean()
        elif self.read:
            y = y + self.body.kept[self.read].mean()
        self.hooked.clear()
        return y if y.sum() > 0 else y + 1


@pytest.mark.parametrize("read", ["middle", "hook"])
def test_a_part_that_gives_more_than_its_outputs_is_refused(read: str) -> None:
    with pytest.raises(
        TaskError, match=r"a tensor computed in body(\.0)? is in the part body, and mean reads"
    ):
        check_parts(Carrying(read), simple("body"))


@pytest.mark.parametrize("read", ["", "out"])
def test_outputs_of_a_part_may_be_read_anyhow(read: str) -> None:
    check_parts(Carrying(read), simple("body"))


def test_a_second_name_of_a_module_is_refused() -> None:
    with pytest.raises(TaskError, match="part='again' is another name of 'body'; give that"):
        check_parts(Carrying(""), simple("again"))


def test_shapes_of_a_part_may_be_read_outside() -> None:
    class Sized(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[:, : self.inner[0].weight.shape[0]].to(self.inner[0].weight.dtype)

    check_parts(Sized(), simple("inner"))


def test_a_model_that_cannot_be_traced_names_its_parts() -> None:
    found = possible_parts(detector(), task(None))
    sizes = {
        key: sum(p.numel() for p in getattr(Detector(), key).parameters()) for key in ("backbone", "head")
    }
    assert found == {key: size / sum(sizes.values()) for key, size in sizes.items()}
    with pytest.raises(RefusedError, match=r"'backbone' \(\d+% of the parameters\), 'head'.*part='backbone'"):
        tersor.run(detector(), tersor.Slim(keep=0.7), task(None))


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RefusedError, match="^something else$"), naming_parts(detector, task(None)):
        raise RefusedError("something else")
