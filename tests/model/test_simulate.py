"""Simulate: grids on edges agree with a slow reference, in calls and in training."""

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from exported import inserted, slow_grid
from nets import Call, benched, floats, nets
from tiny import MODELS, tiny
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tersor.core.state import start
from tersor.errors import RefusedError, SettingError, SiteError
from tersor.forms import Dense
from tersor.forms.grid import Grid
from tersor.model.edges import edges_of
from tersor.model.observe import Ranges, grid_of
from tersor.model.simulate import Simulated, exported, gridded
from tersor.model.trainable_forms import TrainableForms
from tersor.model.watch import active, hooked, running

CALLS: dict[str, Callable[[], Call]] = {
    **{f"tiny {name}": lambda name=name: (tiny(name).model, (tiny(name).x,), {}) for name in MODELS},
    **{name: lambda name=name: nets()[name] for name in nets()},
    **{f"trained {name}": lambda name=name: benched(name) for name in ("resnet20", "tinygpt")},
    "encoder": lambda: (encoder(), (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2)),), {}),
}
SMALL = tuple(call for name, call in CALLS.items() if name != "resnet20" and not name.startswith("trained"))
each_net = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)

THREE = {  # the toy grids: a sum, an inner activation, the input of the last layer
    "resnet20": ["layer1.0/add:0", "layer2.1.conv2/conv2d:0", "/adaptive_avg_pool2d:0"],
    "gpt": ["model.layers.0/add:1", "model.layers.0.mlp/mul:0", "model.layers.1.self_attn/attention:0"],
}
TOYS: dict[str, tuple[Callable[[], Call], list[str]]] = {
    "resnet20": (lambda: nets()["resnet20"], THREE["resnet20"]),
    "gpt": (lambda: nets()["gpt"], THREE["gpt"]),
    "trained resnet20": (lambda: benched("resnet20"), THREE["resnet20"]),
    "trained tinygpt": (lambda: benched("tinygpt"), THREE["gpt"]),
}
each_toy = pytest.mark.parametrize("toy", TOYS)


def encoder() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return nn.TransformerEncoder(layer, 2).eval()


def spanned(call: Call, names: Any, bits: int = 8, *, mixed: bool = False) -> dict[str, Grid]:
    """Grids over the ranges of these edges for these arguments; mixed: several widths, signs and axes."""
    model, args, kwargs = call
    grids = {}
    for n, name in enumerate(names):
        axis = 1 if mixed and n % 4 == 3 else None
        with running(run := Ranges([name], axis)), torch.no_grad():
            hooked(copy.deepcopy(model))(*args, **kwargs)
        low, high = run.found[name]
        shown = {"bits": (8, 4, 3)[n % 3], "signed": n % 2 == 1} if mixed else {"bits": bits}
        grids[name] = grid_of((low * 0.9, high * 0.9), **shown)  # values at the ends are clipped
    return grids


def roundable(call: Call) -> list[str]:
    """All edges but inputs, those with a mask of -inf, and those inside a norm (a mean of squares that is
    rounded to zero has an infinite root); two axes or more, for a channel."""
    model, args, kwargs = call
    net = hooked(copy.deepcopy(model))
    names, edges = [], edges_of(model, *args, **kwargs)
    norms = {edge.path for edge in edges.values() if edge.op == "rsqrt"}
    for name, edge in edges.items():
        if edge.op != "input" and len(edge.shape) > 1 and edge.path not in norms:
            try:
                with running(Ranges([name], None)), torch.no_grad():
                    net(*args, **kwargs)
            except RefusedError:
                continue
            names.append(name)
    return names


def trained_edges(call: Call) -> list[str]:
    """The edges that have the same name in training."""
    return [name for name in roundable(call) if name != "/add:0" or type(call[0]).__name__ != "Branch"]


def tuned_of(call: Call, grids: dict[str, Grid], train: bool = True) -> TrainableForms:
    model, args, kwargs = call
    given = start(model)
    learn = [key for key, site in given.sites.items() if site.is_parameter] if train else []
    return TrainableForms(
        model, given.forms, given.sites, learn, edge_grids=grids, example=lambda net: net(*args, **kwargs)
    )


def assert_equal(a: Any, b: Any) -> None:
    assert floats(a)
    for x, y in zip(floats(a), floats(b), strict=True):
        assert torch.equal(x, y)


# --- values ---


@pytest.mark.sampled(call=SMALL)
@each_net
def test_the_simulation_is_the_graph_with_grids_inserted_by_name(call: Callable[[], Call]) -> None:
    model, args, kwargs = here = call()
    names = roundable(here)
    grids = spanned(here, names if len(names) < 80 else names[::3], mixed=True)
    simulated = gridded(model, grids)
    with torch.no_grad():
        plain, got = model(*args, **kwargs), simulated(*args, **kwargs)
        module, slow = inserted(model, grids, args, kwargs)
        want = module(*args, **kwargs)
        program = exported(simulated, *args, **kwargs)
        out = program.module()(*args, **kwargs)
    assert_equal(got, want)
    assert_equal(got, out)
    assert not all(torch.equal(a, b) for a, b in zip(floats(got), floats(plain), strict=True))
    marks = [node for node in program.graph.nodes if node.target is torch.ops.tersor.grid.default]
    assert len(marks) == len(slow) >= len(grids)


@pytest.mark.sampled(call=SMALL)
@each_net
def test_a_trainable_model_agrees_with_the_simulation(call: Callable[[], Call]) -> None:
    model, args, kwargs = here = call()
    grids = spanned(here, trained_edges(here)[:12], mixed=True)
    tuned = tuned_of(here, grids).eval()
    got = tuned(*args, **kwargs)  # with gradients, as in training
    with torch.no_grad():
        assert_equal(got, gridded(model, grids)(*args, **kwargs))
        assert_equal(got, tuned(*args, **kwargs))


def test_inputs_are_rounded_by_name() -> None:
    model, args, kwargs = here = nets()["nested"]
    grids = spanned(here, ["/input:pair.1", "/input:extra.bias"], bits=3)
    pair, bias = args[0], kwargs["extra"]["bias"]
    rounded = (pair[0], slow_grid(pair[1], grids["/input:pair.1"]))
    want = model(rounded, extra={"bias": slow_grid(bias, grids["/input:extra.bias"])})
    simulated = gridded(model, grids)
    assert_equal(simulated(*args, **kwargs), want)
    assert_equal(simulated(extra=kwargs["extra"], pair=pair), want)
    assert_equal(exported(simulated, *args, **kwargs).module()(*args, **kwargs), want)


def test_rounding_an_input_counts_no_operators_of_the_model() -> None:
    """The grid on the input adds, multiplies and clamps outside of any operator of the model."""

    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ((x + 1.0) * 2.0).clamp(max=3.0) - 0.5

    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    here: Call = (Sum(), (x,), {})
    names = list(edges_of(*here[:1], *here[1]))
    assert names == ["/input:x", "/add:0", "/mul:0", "/clamp:0", "/sub:0"]
    grids = spanned(here, names, bits=4)
    with running(run := Ranges(names, None, "mse")), torch.no_grad():
        hooked(Sum())(x)
    assert list(run.seen) == names
    want = slow_grid(x, grids["/input:x"])
    for name, change in (
        ("/add:0", lambda x: x + 1.0),
        ("/mul:0", lambda x: x * 2.0),
        ("/clamp:0", lambda x: x.clamp(max=3.0)),
        ("/sub:0", lambda x: x - 0.5),
    ):
        want = slow_grid(change(want), grids[name])
    assert_equal(gridded(Sum(), grids)(x), want)
    assert_equal(exported(gridded(Sum(), grids), x).module()(x), want)


def test_without_grids_outputs_are_those_of_the_model() -> None:
    for model, args, kwargs in nets().values():
        assert_equal(Simulated(model)(*args, **kwargs), model(*args, **kwargs))


# --- training ---


def loss_of(output: Any, target: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits.flatten(0, 1)
    return F.cross_entropy(logits, target)


def target_of(call: Call) -> Tensor:
    logits = call[0](*call[1], **call[2])
    logits = logits if isinstance(logits, Tensor) else logits.logits.flatten(0, 1)
    return torch.randint(0, logits.shape[1], logits.shape[:1], generator=torch.Generator().manual_seed(0))


@pytest.mark.sampled(toy=("resnet20", "gpt"))
@each_toy
def test_twenty_steps_of_a_plain_loop(toy: str) -> None:
    """Called with the module's own signature; weights and scales change, and fold gives the trained ones."""
    make, names = TOYS[toy]
    model, args, kwargs = here = make()
    grids, target = spanned(here, names, bits=4), target_of(here)
    tuned = tuned_of(here, grids).train()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = loss_of(tuned(*args, **kwargs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    folded = tuned.fold_grids()
    assert list(folded) == names
    for name, grid in folded.items():
        assert not torch.equal(grid.scale.decode(), grids[name].scale.decode())
        assert (grid.bits, grid.zero.digest) == (grids[name].bits, grids[name].zero.digest)
    again = copy.deepcopy(model)  # the trained weights in the plain model, the trained grids on its edges
    forms = start(model).forms | tuned.fold()
    again.load_state_dict({key: form.decode() for key, form in forms.items()}, strict=False)
    with torch.no_grad():
        assert_equal(gridded(again.eval(), folded)(*args, **kwargs), tuned.eval()(*args, **kwargs))


def test_a_fine_grid_keeps_its_scale_in_a_short_training() -> None:
    """Adam moves each number by about the learning rate: a scale of 1e-4 by ten times itself."""
    make, names = TOYS["resnet20"]
    _, args, kwargs = here = make()
    grids = {
        name: grid.replace(scale=Dense(grid.scale.decode() * 1e-2))
        for name, grid in spanned(here, names, bits=16).items()
    }
    tuned = tuned_of(here, grids).train()
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        sum(out.square().sum() for out in floats(tuned(*args, **kwargs))).backward()
        optimizer.step()
    moved = [
        float(grid.scale.decode() / grids[name].scale.decode()) - 1
        for name, grid in tuned.fold_grids().items()
    ]
    assert 0 < max(map(abs, moved)) < 0.03


@pytest.mark.sampled(call=SMALL)
@each_net
def test_every_used_scale_gets_the_gradient_of_a_slow_reference(call: Callable[[], Call]) -> None:
    """The exported graph of the plain model with autograd functions inserted by name; weights and scales."""
    model, args, kwargs = here = call()
    names = trained_edges(here)
    grids = spanned(here, names[:: max(1, len(names) // 12)], mixed=True)
    tuned = tuned_of(here, grids, train=False).eval()
    sum(out.square().sum() for out in floats(tuned(*args, **kwargs))).backward()
    module, slow = inserted(model, grids, args, kwargs)
    sum(out.square().sum() for out in floats(module(*args, **kwargs))).backward()
    for name in grids:
        grads = [one.scale.grad for other, one in slow if other == name]
        size = sum(one.size for other, one in slow if other == name)
        assert grads
        want = sum(grad for grad in grads if grad is not None)
        got = tuned.grids[tuned.table[name]].steps.factor.grad
        if isinstance(want, Tensor):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * size)
        else:  # no output depends on this edge: an LSTM's last state, for example
            assert got is None
    assert any(factor.grad.abs().max() > 0 for factor in tuned.grids.parameters() if factor.grad is not None)


def test_weights_get_the_gradient_of_a_slow_reference() -> None:
    model, args, kwargs = here = nets()["residual"]
    grids = spanned(here, trained_edges(here), mixed=True)
    tuned = tuned_of(here, grids).eval()
    tuned(*args, **kwargs).square().sum().backward()
    module, _ = inserted(model, grids, args, kwargs)
    module(*args, **kwargs).square().sum().backward()
    for key, parameter in module.named_parameters():
        if not key.startswith("slow_"):
            key = key.replace("alias", "twice.0")
            torch.testing.assert_close(tuned.part_of(key).w.grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_needs_resume_for_grids_and_is_then_exact() -> None:
    """Recomputation in backward has no grids without it; weights: tests/model/test_checkpointing.py."""
    for names in (THREE["gpt"], []):
        here = nets()["gpt"]
        tuned = tuned_of(here, spanned(here, names, bits=4)).train()
        with torch.no_grad():  # other values than those of the hidden net
            for parameter in tuned.parameters():
                parameter.mul_(1.1)
        tokens = here[2]["input_ids"]
        tuned(tokens, labels=tokens).loss.backward()
        want = {key: p.grad.clone() for key, p in tuned.named_parameters()}
        tuned.zero_grad()
        tuned.net.model.thrifty = True
        with pytest.raises(RefusedError, match="context_fn=tuned.resume") if names else nullcontext():
            tuned(tokens, labels=tokens).loss.backward()
        assert active() is None
        tuned.zero_grad()
        tuned.net.model.again = tuned.resume
        tuned(tokens, labels=tokens).loss.backward()
        assert active() is None
        for key, parameter in tuned.named_parameters():
            assert torch.equal(parameter.grad, want[key]), key
        tuned.zero_grad()
        loss = tuned(tokens, labels=tokens).loss
        for _ in range(2):  # a retained graph may be recomputed twice, with the same names
            loss.backward(retain_graph=True)
        for key, parameter in tuned.named_parameters():
            assert torch.equal(parameter.grad, 2 * want[key]), key
        tuned.net.model.again = None


class Tied(nn.Module):
    """Recomputes a function that is not a module, in the middle of its counts, with a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.again: Any = None

    def forward(self, x: Tensor) -> Tensor:
        def rest(x: Tensor) -> Tensor:
            return self.b(self.b(x).tanh()).tanh()

        x = self.a(x).tanh()
        if self.again is None:
            return rest(x)
        return checkpoint(rest, x, use_reentrant=False, context_fn=self.again)


def test_recomputation_continues_the_counts_and_uses_ties() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    here: Call = (Tied(), (x,), {})
    tuned = tuned_of(here, spanned(here, ["/tanh:0", "/tanh:1", "b/linear:0"], bits=3))
    with torch.no_grad():
        tuned.part_of("a.weight").w.mul_(3)
    tuned(x).sum().backward()
    want = {key: p.grad.clone() for key, p in tuned.named_parameters()}
    tuned.zero_grad()
    tuned.net.again = tuned.resume
    tuned(x).sum().backward()
    for key, parameter in tuned.named_parameters():
        assert torch.equal(parameter.grad, want[key]), key


def test_resume_outside_of_a_forward_is_refused() -> None:
    with pytest.raises(RefusedError, match="outside of the model's forward"):
        tuned_of(nets()["gpt"], {}).resume()


# --- all uses of a module ---


def three(toy: str = "gpt", bits: int = 4) -> tuple[Call, TrainableForms]:
    here = nets()[toy]
    return here, tuned_of(here, spanned(here, THREE[toy], bits=bits))


def test_the_signature_is_the_modules_own() -> None:
    for model, args, kwargs in nets().values():
        for made in (Simulated(model), tuned_of((model, args, kwargs), {})):
            for one in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
                assert inspect.signature(one.forward) == inspect.signature(model.forward)
                assert_equal(one.eval()(*args, **kwargs), model(*args, **kwargs))
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        Simulated(nets()["gpt"][0])(torch.zeros(1, 2, dtype=torch.long), mask=None)


def test_copies_are_independent_and_can_be_made_with_a_live_graph() -> None:
    (_, args, kwargs), tuned = three()
    tuned.eval()
    out = tuned(*args, **kwargs)
    for one in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert_equal(one(*args, **kwargs), out)
        with torch.no_grad():
            next(iter(one.grids.values())).steps.factor.mul_(3)
        assert not torch.equal(one(*args, **kwargs).logits, out.logits)
        assert_equal(tuned(*args, **kwargs), out)


def test_autocast_in_bf16_trains() -> None:
    (model, args, kwargs), tuned = three("resnet20")
    with torch.autocast("cpu", torch.bfloat16):
        out = tuned.eval()(*args, **kwargs)
        assert_equal(out, gridded(model, tuned.fold_grids())(*args, **kwargs))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.parameters())


def test_functional_gradients_are_backwards() -> None:
    (_, args, kwargs), tuned = three()
    tokens = kwargs["input_ids"]
    tuned(tokens, labels=tokens).loss.backward()
    values = {key: p.detach() for key, p in tuned.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(tuned, values, (tokens,), {"labels": tokens}).loss

    grads = torch.func.grad(loss)(values)
    for key, parameter in tuned.named_parameters():
        torch.testing.assert_close(grads[key], parameter.grad)


def test_ddp_in_one_process() -> None:
    (_, args, kwargs), tuned = three("resnet20")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        shared = nn.parallel.DistributedDataParallel(tuned.train())
        for _ in range(2):
            shared(*args, **kwargs).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in tuned.parameters())


def test_two_threads_train_two_copies_and_call_one() -> None:
    (model, args, kwargs), tuned = three()
    twins, tokens = (
        [copy.deepcopy(tuned) for _ in range(2)],
        [kwargs["input_ids"], kwargs["input_ids"].flip(1)],
    )
    one = gridded(model, tuned.fold_grids())

    def grads(i: int) -> list[Tensor]:
        for _ in range(5):
            twins[i].zero_grad()
            twins[i](tokens[i], labels=tokens[i]).loss.backward()
            answer = one(tokens[i]).logits
        return [answer, *(p.grad.clone() for p in twins[i].parameters())]

    want, got = [grads(0), grads(1)], [None, None]
    threads = [threading.Thread(target=lambda i=i: got.__setitem__(i, grads(i))) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(want, got, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    (_, args, kwargs), tuned = three()
    with pytest.raises(IndexError):
        tuned(torch.tensor([[1000]]))
    assert active() is None
    assert not torch._C._len_torch_function_stack()
    assert floats(tuned(*args, **kwargs))


@pytest.mark.wide
def test_compiled_whole() -> None:
    (_, args, kwargs), tuned = three()
    want = tuned.eval()(*args, **kwargs).logits
    got = torch.compile(tuned, fullgraph=True, backend="eager")(*args, **kwargs).logits
    torch.testing.assert_close(got, want)


def test_non_persistent_buffers_move_too() -> None:
    """They are in the hidden net only, and would stay on the CPU."""
    (_, _, kwargs), tuned = three()
    assert "frequency" not in str(list(tuned.net.state_dict()))
    tuned.to("meta")
    assert tuned.net.model.frequency.device.type == "meta"
    assert tuned.net.lm_head.weight.device.type == "cpu"  # not used: its value comes from a part


def test_a_model_is_freed_with_its_last_reference() -> None:
    gc.disable()
    try:
        for make in (lambda: Simulated(nets()["gpt"][0]), lambda: three()[1]):
            made = make()
            made(nets()["gpt"][2]["input_ids"])
            held = weakref.ref(made)
            del made
            assert held() is None
    finally:
        gc.enable()


def test_the_given_model_is_not_changed() -> None:
    model, args, kwargs = here = nets()["resnet20"]
    before = copy.deepcopy(model.state_dict())
    tuned = tuned_of(here, spanned(here, THREE["resnet20"])).train()
    tuned(*args, **kwargs).sum().backward()
    gridded(model, tuned.fold_grids()).train()(*args, **kwargs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# --- refusals ---


def test_wrong_edges_and_models_are_refused() -> None:
    model, args, kwargs = here = nets()["resnet20"]
    name = "layer1.0/add:0"
    grid = spanned(here, [name])[name]
    with pytest.raises(SiteError, match=r"no module 'layer1.O'; did you mean 'layer1"):
        gridded(model, {"layer1.O/add:0": grid})
    with pytest.raises(SiteError, match="is no edge name"):
        gridded(model, {"layer1.0.add": grid})
    with pytest.raises(SettingError, match="give example=lambda"):
        TrainableForms(model, {}, {}, [], edge_grids={name: grid})
    with pytest.raises(SiteError, match=r"training: the model has no edge 'layer1.0/add:1'"):
        tuned_of(here, {"layer1.0/add:1": grid})
    with pytest.raises(SiteError, match=r"export: the model has no edge 'layer1.0/add:1'"):
        exported(gridded(model, {"layer1.0/add:1": grid}), *args, **kwargs)
    with pytest.raises(RefusedError, match="fold it, then call gridded"):
        exported(tuned_of(here, {name: grid}), *args, **kwargs)
    with pytest.raises(RefusedError, match="runs other operators in training"):
        tuned_of(nets()["branch"], {"/add:0": grid})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stale": True}, "is stale: the model has changed"),
        ({"bits": 17}, "bits=17, but 1 to 16"),
        ({"scale": Dense(torch.tensor([0.0]))}, "not a positive number"),
        ({"scale": Dense(torch.tensor([torch.nan]))}, "not a positive number"),
        ({"zero": Dense(torch.tensor([256]))}, "one of its codes, 0 to 255"),
        ({"zero": Dense(torch.tensor([1, 2]))}, r"scale \[1\], zero \[2\]"),
        ({"scale": Dense(torch.tensor(1.0)), "zero": None}, r"scale \[\]"),
    ],
)
def test_wrong_grids_are_refused(change: dict[str, Any], says: str) -> None:
    here = nets()["resnet20"]
    grid = spanned(here, ["/relu:0"])["/relu:0"].replace(**change)
    with pytest.raises((RefusedError, SettingError), match=f"/relu:0.*{says}"):
        gridded(here[0], {"/relu:0": grid})


def test_a_grid_of_other_channels_is_refused() -> None:
    model, args, kwargs = nets()["resnet20"]
    grid = Grid(Dense(torch.ones(5)), None, axis=1)
    with pytest.raises(
        RefusedError, match=r"/relu:0: a grid of 5 channels on axis 1, but the edge is now \[3, 4, 8, 8\]"
    ):
        gridded(model, {"/relu:0": grid})(*args, **kwargs)


class Fresh(nn.Module):
    """Operators that return their result."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        y = y.add(1.0)
        y = y + x
        y = F.leaky_relu(y, 0.3)
        y = F.hardtanh(y, -0.5, 3.0)
        return self.b(y.mul(0.5))


class InPlace(Fresh):
    """The same operators, which write their result where they read, and whose return is not used."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        shown = y
        y.relu_()
        y.add_(1.0)
        y += x
        F.leaky_relu(y, 0.3, inplace=True)
        F.hardtanh(y, -0.5, 3.0, True)
        y.mul_(0.5)
        return self.b(shown)


def test_what_an_operator_writes_in_place_is_rounded_for_all_that_read_it_later() -> None:
    torch.manual_seed(0)
    fresh, written, x = Fresh(), InPlace(), torch.randn(16, 6)
    written.load_state_dict(fresh.state_dict())
    names = [f"/{op}:{k}" for op, k in (("relu", 0), ("add", 0), ("add", 1), ("leaky_relu", 0),
                                        ("hardtanh", 0), ("mul", 0))]  # fmt: skip
    grids = spanned((fresh, (x,), {}), names, bits=3)
    grids["a/linear:0"] = grids["/mul:0"]
    one, other = (gridded(net, grids) for net in (fresh, written))
    assert torch.equal(one(x), other(x))
    assert not torch.equal(one(x), fresh(x))
    assert torch.equal(exported(other, x).module()(x), one(x))
    gradients = []
    for net in (one, other):
        net.requires_grad_(True)
        net(x).square().sum().backward()
        gradients.append([item.grad for item in net.parameters()])
    assert all(map(torch.equal, *gradients))
    assert all(bool(item.any()) for item in gradients[0][:4])


class Keywords(nn.Module):
    """Calls with their inputs by keyword, or in order."""

    def __init__(self, keywords: bool) -> None:
        super().__init__()
        self.keywords = keywords
        self.body, self.conv = nn.Linear(6, 6), nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        w, b, c = self.body.weight, self.body.bias, self.conv.weight
        if self.keywords:
            x = x + F.linear(input=x, weight=w, bias=b)
            x = x + torch.matmul(input=x, other=w)
            x = x + torch.mm(mat2=w, input=x)
            x = x + torch.addmm(mat2=w, mat1=x, input=b)
            return F.conv1d(bias=None, weight=c, input=x[:, None])
        x = x + F.linear(x, w, b)
        x = x + torch.matmul(x, w)
        x = x + torch.mm(x, w)
        x = x + torch.addmm(b, x, w)
        return F.conv1d(x[:, None], c, None)


def test_what_is_read_by_keyword_is_rounded_too() -> None:
    torch.manual_seed(0)
    plain, named = Keywords(False), Keywords(True)
    named.load_state_dict(plain.state_dict())
    x = torch.randn(5, 6)
    for edge in ("/linear:0<0", "/matmul:0<0", "/matmul:1<0", "/addmm:0<1", "/conv1d:0<0"):
        grid = Grid(Dense(torch.tensor([0.25])), None, bits=4, signed=True)
        found = [gridded(copy.deepcopy(each), {edge: grid})(x) for each in (plain, named)]
        assert torch.equal(*found), edge
        assert not torch.allclose(found[0], plain(x), atol=1e-3), edge
