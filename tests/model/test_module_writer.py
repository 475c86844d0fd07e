"""Fitted: forms are written to a copy of the model they were made from, in their dtypes, and to no other."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_forms import Draw
from tiny import MODELS, tiny
from torch import nn

from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State, start
from tersor.errors import RefusedError, SiteError
from tersor.forms import Affine, Dense
from tersor.io.container import load
from tersor.io.pack import pack
from tersor.model.module_writer import write_module
from tersor.model.sites import sites_of
from tersor.steps import Prune, Quantize


@pytest.mark.parametrize("name", MODELS)
def test_undone_forms_give_the_outputs_of_the_model(name: str) -> None:
    t = tiny(name)
    plain = start(t.model)
    assert torch.equal(t.out(write_module(t.model, plain.forms, plain.sites)), t.out())


@pytest.mark.parametrize("name", MODELS)
def test_the_copy_has_the_decoded_weights_and_the_model_does_not_change(name: str) -> None:
    t = tiny(name)
    before = {key: value.clone() for key, value in t.model.state_dict().items()}
    plain = start(t.model)
    forms = {
        key: Dense(form.decode() + 1) if form.decode().is_floating_point() else form
        for key, form in plain.forms.items()
    }
    twin = write_module(t.model, forms, plain.sites)
    assert type(twin) is type(t.model)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, before[key] + 1 if value.is_floating_point() else before[key])
        assert torch.equal(t.model.state_dict()[key], before[key])
        assert value.data_ptr() != t.model.state_dict()[key].data_ptr()


def test_a_fitted_model_trains_without_changing_its_forms() -> None:
    """Parameters stay parameters, and training the copy changes no form."""
    t = tiny("conv")
    plain = start(t.model)
    digests = {name: form.digest for name, form in plain.forms.items()}
    twin = write_module(t.model, plain.forms, plain.sites)
    twin.train()
    twin(t.x).sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= parameter.grad
    assert {name: Dense(form.decode().clone()).digest for name, form in plain.forms.items()} == digests


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_grids_come_back_in_the_models_dtype(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 2).to(dtype)
    plain = start(model)
    grid = Affine(Dense(torch.ones(2, 4, dtype=torch.int8)), Dense(torch.tensor([[0.1], [3.0]])))
    twin = write_module(model, {**plain.forms, "weight": grid}, plain.sites)
    assert twin.weight.dtype is dtype
    assert torch.equal(twin.weight, torch.tensor([[0.1], [3.0]]).to(dtype).expand(2, 4))
    result = run(model, [Prune(keep=0.5)])
    assert {value.dtype for value in result.state_dict().values()} == {dtype}
    assert {value.dtype for value in result.model().state_dict().values()} == {dtype}


def test_tied_weights_are_filled_once_and_stay_tied() -> None:
    t = tiny("attention")
    plain = start(t.model)
    twin = write_module(t.model, plain.forms | {"embed.weight": Dense(torch.ones(11, 8))}, plain.sites)
    assert twin.head.weight is twin.embed.weight
    assert (twin.head.weight == 1).all()


class Longer(nn.Sequential):
    def __init__(self, *sizes: int):
        super().__init__(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))


WRONG = {
    "a layer more": (Longer(3, 4, 4, 2), "the model has 2.bias, which the forms lack"),
    "a layer less": (Longer(3, 4), "the model lacks 1.bias, which the forms have; did you mean"),
    "another width": (
        Longer(3, 5, 2),
        "0.weight: the model has shape [5, 3], the form [4, 3]. Give the model",
    ),
    "another kind": (nn.Linear(3, 4), "the model has bias, which the forms lack"),
}


@pytest.mark.parametrize("what", WRONG)
def test_another_model_is_refused(what: str) -> None:
    model, says = WRONG[what]
    plain = start(Longer(3, 4, 2))
    with pytest.raises(SiteError) as caught:
        plain.model(model)
    assert says in str(caught.value)


def test_a_refused_model_does_not_change() -> None:
    plain = start(Longer(3, 4, 2))
    model = Longer(3, 4, 5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SiteError):
        write_module(model, plain.forms, plain.sites)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- ties that differ ---


class Two(nn.Module):
    """Two layers of one shape, tied or not."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        if tied:
            self.b.weight = self.a.weight


def packed(state: dict[str, torch.Tensor], tmp_path: Path) -> State:
    """The state of a file that was packed from a checkpoint with these tensors."""
    torch.save(state, tmp_path / "w.pt")
    pack(tmp_path / "w.pt", tmp_path / "m.tersor", Recipe((Quantize(bits=4),)))
    return load(tmp_path / "m.tersor")


@pytest.mark.parametrize("held", [("a.weight",), ("b.weight",), ("a.weight", "b.weight")])
def test_a_model_may_tie_tensors_that_a_checkpoint_holds_once_or_twice(
    held: tuple[str, ...], tmp_path: Path
) -> None:
    weight = torch.randn(3, 3)
    loaded = packed({name: weight.clone() for name in held}, tmp_path)
    twin = loaded.model(Two(tied=True))
    assert twin.a.weight is twin.b.weight
    assert torch.equal(twin.a.weight, loaded.state_dict()[held[0]])


def test_a_model_may_untie_tensors_that_a_checkpoint_ties(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    loaded = packed({"a.weight": weight, "b.weight": weight}, tmp_path)
    assert loaded.aliases == {"b.weight": "a.weight"}
    twin = loaded.model(Two(tied=False))
    assert twin.a.weight is not twin.b.weight
    for layer in (twin.a, twin.b):
        assert torch.equal(layer.weight, loaded.state_dict()["a.weight"])


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    loaded = packed({"a.weight": torch.ones(3, 3), "b.weight": torch.zeros(3, 3)}, tmp_path)
    with pytest.raises(SiteError, match=r"ties a\.weight and b\.weight, but their forms differ"):
        loaded.model(Two(tied=True))


def test_one_of_two_names_is_not_enough_without_a_tie(tmp_path: Path) -> None:
    loaded = packed({"a.weight": torch.ones(3, 3)}, tmp_path)
    with pytest.raises(SiteError, match=r"the model has b\.weight, which the forms lack"):
        loaded.model(Two(tied=False))


# --- nothing is lost, nothing is shared ---


class Odds(nn.Module):
    """What modules hold besides weights: non-persistent buffers, lists, attributes, hooks, marks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.again = self.a
        self.a.weight.requires_grad_(False)
        self.a.bias.no_decay = True
        self.turned = nn.Parameter(torch.randn(5, 3).T)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("also", self.kept)
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)
        self.weights, self.note = [self.a.weight, self.b.weight], {"of": self.turned, "width": (3, 4)}
        self.a.eval()
        self.a.register_forward_hook(lambda module, args, out: out + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 3]
        x = self.again(x) @ self.weights[0] + self.kept + self.note["of"].sum(1)
        return x * self.passing.sum() + self.b(x[:, :2, None, None].expand(-1, -1, 3, 3)).sum()


def test_everything_besides_weights_is_copied() -> None:
    model, x = Odds(), torch.randn(2, 3)
    plain = start(model)
    twin = write_module(model, plain.forms, plain.sites, plain.aliases)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
    assert twin.again is twin.a
    assert twin.weights[0] is twin.a.weight
    assert twin.weights[1] is twin.b.weight
    assert twin.note["of"] is twin.turned
    assert twin.kept is twin.also
    assert twin.note["width"] == (3, 4)
    assert not twin.a.weight.requires_grad
    assert twin.a.bias.requires_grad
    assert twin.a.bias.no_decay
    assert (twin.a.training, twin.b.training) == (False, True)
    assert set(dict(twin.named_buffers())) == {"kept", "passing"}
    for name, value in twin.state_dict().items():
        assert value.stride() == model.state_dict()[name].stride()
    mine = {t.untyped_storage().data_ptr() for t in (*twin.parameters(), *twin.buffers())}
    theirs = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    stored = {form.decode().untyped_storage().data_ptr() for form in plain.forms.values()}
    assert not mine & (theirs | stored)


def test_the_order_of_axes_in_memory_survives_a_cut() -> None:
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    plain = start(model)
    forms = {name: form.take(0, torch.tensor([0, 2, 5])) for name, form in plain.forms.items()}
    twin = write_module(model, forms, plain.sites)
    assert twin.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(twin.weight, model.weight[[0, 2, 5]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cut_in_every_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)).to(dtype)
    plain = start(model)
    forms = dict(plain.forms)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        forms[name] = forms[name].take(0, torch.tensor([1, 4]))
    twin = write_module(model, forms, plain.sites)
    assert {value.dtype for value in twin.state_dict().values()} == {dtype}
    assert (twin[0].out_features, twin[1].normalized_shape) == (2, (2,))
    assert torch.equal(twin[0].weight, model[0].weight[[1, 4]])


def test_the_dtype_is_that_of_the_site() -> None:
    """Forms of a half model in a fresh float32 one: the copy runs with the stored values and dtype."""
    plain = start(nn.Linear(3, 2).half())
    twin = write_module(nn.Linear(3, 2), plain.forms, plain.sites)
    assert twin.weight.dtype is torch.float16
    assert torch.equal(twin.weight, plain.forms["weight"].decode())
    whole = start(nn.Linear(3, 2))
    model = nn.Module()
    model.register_buffer("weight", torch.ones(2, 3, dtype=torch.int8))
    model.register_buffer("bias", torch.ones(2))
    says = r"weight: the model has shape \[2, 3\] of torch.int8, the form \[2, 3\] of torch.float32"
    with pytest.raises(SiteError, match=says):
        write_module(model, whole.forms, whole.sites)


def test_tensors_stay_on_their_device() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    plain = start(model)
    forms = {
        name: form.take(0, torch.tensor([1, 4])) if form.shape else form for name, form in plain.forms.items()
    }
    twin = write_module(model.to("meta"), forms, plain.sites)
    assert {value.device.type for value in twin.state_dict().values()} == {"meta"}
    assert twin(torch.empty(2, 4, device="meta")).shape == (2, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensors_stay_on_a_gpu() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.LSTM(6, 5)}).cuda()
    plain = start(model)
    twin = write_module(model, plain.forms, plain.sites)
    assert {value.device.type for value in twin.state_dict().values()} == {"cuda"}
    x = torch.randn(3, 2, 6, device="cuda")
    assert torch.equal(twin["b"](x)[0], model["b"](x)[0])


def test_tied_weights_are_cut_together() -> None:
    """An embedding that is tied to the head's weight is cut in both."""
    t = tiny("attention")
    plain = start(nn.ModuleDict({"embed": t.model.embed, "head": t.model.head}))
    forms = {"embed.weight": plain.forms["embed.weight"].take(1, torch.tensor([0, 3, 7]))}
    twin = write_module(plain.given, forms, plain.sites, plain.aliases)
    assert twin["head"].weight is twin["embed"].weight
    assert (twin["embed"].embedding_dim, twin["head"].in_features, twin["head"].out_features) == (3, 3, 11)


class Residual(nn.Module):
    """A bottleneck with a skip, and an inverted one: expanded, depthwise, projected."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.bn4 = nn.Conv2d(6, 9, 1), nn.BatchNorm2d(9)
        self.depth, self.bn5 = nn.Conv2d(9, 9, 3, padding=1, groups=9), nn.BatchNorm2d(9)
        self.project = nn.Conv2d(9, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        x = (x + self.bn3(self.conv3(y))).relu()
        return x + self.project(self.bn5(self.depth(self.bn4(self.expand(x)).relu())).relu())


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1)
    return model.eval()


def test_cut_channels_of_blocks_equal_zero_channels() -> None:
    """The cut removes what makes, normalizes and reads a channel; the rest of the block does not change."""
    model = randomized(Residual()).double()
    plain = start(model)
    forms, norms = dict(plain.forms), ("weight", "bias", "running_mean", "running_var")
    # One channel of each group stays; the depthwise layer loses five.
    one, two, wide = [0, 2], [1, 2], [0, 2, 3, 8]
    cuts = [
        ("conv1.weight", 0, one),
        ("conv2.weight", 1, [0]),
        ("conv2.weight", 0, two),
        ("conv3.weight", 1, two),
    ]
    cuts += [(f"bn1.{name}", 0, one) for name in norms] + [(f"bn2.{name}", 0, two) for name in norms]
    cuts += [(f"{name}.weight", 0, wide) for name in ("expand", "depth")]
    cuts += [(f"{name}.bias", 0, wide) for name in ("expand", "depth")] + [("project.weight", 1, wide)]
    cuts += [(f"bn{k}.{name}", 0, wide) for name in norms for k in (4, 5)]
    for name, axis, kept in cuts:
        forms[name] = forms[name].take(axis, torch.tensor(kept))
    twin = write_module(model, forms, plain.sites)
    zero = copy.deepcopy(model)
    with torch.no_grad():
        zero.conv2.weight[:, 1] = 0  # it reads channels 1 and 3 of conv1, the second channel of each group
        for name, kept in (("conv3", two), ("project", wide)):
            weight = zero.get_submodule(name).weight
            weight[:, [k for k in range(weight.shape[1]) if k not in kept]] = 0
    x = torch.rand(2, 6, 5, 5).double()
    with torch.no_grad():
        assert torch.allclose(twin(x), zero(x), rtol=1e-12)
        assert not torch.allclose(model(x), zero(x), rtol=1e-3)
    assert (twin.depth.groups, twin.conv2.groups, twin.conv2.in_channels, twin.bn5.num_features) == (
        4,
        2,
        2,
        4,
    )


# --- read back ---


def with_hook(change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A layer whose state dict holds a changed weight."""
    model = nn.Linear(3, 2)

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
        state[prefix + "weight"] = change(state[prefix + "weight"])

    model.register_state_dict_post_hook(hook)
    return model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            torch.Tensor.half,
            r"weight: the state dict holds torch.float16 \[2, 3\], but the module has torch.float32",
        ),
        (torch.Tensor.t, r"weight: the state dict holds torch.float32 \[3, 2\], but the module has"),
        (lambda w: w * 2, "weight: the state dict holds other values than the module"),
        (lambda w: w.flip(0), "weight: the state dict holds other values than the module"),
        (lambda w: w.half().float(), "weight: the state dict holds other values than the module"),
    ],
)
def test_hooks_that_change_the_state_dict_are_refused(change: Any, says: str) -> None:
    """They are refused before any forward."""
    model = with_hook(change)
    with pytest.raises(RefusedError, match=says):
        start(model)


def drop(state: dict[str, Any]) -> None:
    del state["0.bias"]


def add(state: dict[str, Any]) -> None:
    state["0.scale"] = torch.ones(1)


def swap(state: dict[str, Any]) -> None:
    state["0.weight"], state["1.weight"] = state["1.weight"], state["0.weight"]


def cast(state: dict[str, Any]) -> None:
    state.update({name: value.half().float() for name, value in state.items()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop, "0.bias: the module has it, but its state dict does not.*persistent=False"),
        (add, "0.scale: the state dict holds a tensor that is not a parameter or buffer of the module"),
        (swap, "0.weight: the state dict holds another of the module's tensors under this name"),
        (cast, "0.weight: the state dict holds other values than the module"),
    ],
)
@pytest.mark.parametrize("how", ["private hook", "post hook", "override"])
def test_a_state_dict_that_is_not_the_modules_own_is_refused(change: Any, says: str, how: str) -> None:
    class Own(nn.Sequential):
        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            state = super().state_dict(*args, **kwargs)
            if how == "override":
                change(state)
            return state

    model = Own(nn.Linear(3, 3), nn.Linear(3, 3))
    if how == "private hook":
        model._register_state_dict_hook(lambda module, state, prefix, local: change(state))
    elif how == "post hook":
        model.register_state_dict_post_hook(lambda module, state, prefix, local: change(state))
    with pytest.raises(RefusedError, match=says):
        start(model)


def test_a_non_persistent_buffer_may_be_missing() -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("table", torch.ones(2), persistent=False)
    assert list(start(model).sites) == ["weight", "bias"]


def test_tied_tensors_stay_tied_if_the_state_dict_gives_copies() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    model._register_state_dict_hook(lambda m, state, p, local: {n: v.clone() for n, v in state.items()})
    assert start(model).aliases == {"1.weight": "0.weight"}


@pytest.mark.parametrize("change", [torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.contiguous])
def test_hooks_that_change_no_value_are_fine(change: Any) -> None:
    model = with_hook(change)
    plain = start(model)
    forms = {**plain.forms, "weight": Dense(torch.ones(2, 3))}
    assert torch.equal(write_module(model, forms, plain.sites).weight, torch.ones(2, 3))


class Master(nn.Module):
    """Its weight in the state dict is a copy of another tensor, made on each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.master = nn.Parameter(torch.randn(4, 3)), torch.randn(4, 3)
        self.register_state_dict_pre_hook(type(self).sync)

    def sync(self, prefix: str, keep_vars: bool) -> None:
        self.weight.data.copy_(self.master)


def test_weights_that_the_state_dict_computes_are_refused() -> None:
    model = Master()
    plain = start(model)
    forms = {"weight": Dense(torch.ones(4, 3))}
    with pytest.raises(RefusedError, match="weight: the written value is changed in its state dict"):
        write_module(model, forms, plain.sites)


def test_a_module_whose_copy_is_newly_initialized() -> None:
    class Anew(nn.Linear):
        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            self.reset_parameters()

    model = Anew(3, 2)
    plain = start(model)
    forms = {"weight": Dense(torch.ones(2, 3)), "bias": Dense(torch.zeros(2))}
    assert torch.equal(write_module(model, forms, plain.sites)(torch.ones(1, 3)), torch.full((1, 2), 3.0))


class Single(nn.Linear):
    """It cannot be copied."""

    def __deepcopy__(self, memo: Any) -> nn.Module:
        return self


def test_a_module_that_cannot_be_copied_is_refused_and_does_not_change() -> None:
    model = nn.Sequential(Single(3, 2))
    before = model[0].weight.clone()
    sites, _, _ = sites_of(model)
    forms = {"0.weight": Dense(torch.ones(2, 3)), "0.bias": Dense(torch.zeros(2))}
    with pytest.raises(RefusedError, match="0: copy.deepcopy of this Single returns the module"):
        write_module(model, forms, sites)
    assert torch.equal(model[0].weight, before)


class Sharing(nn.Linear):
    """Its copies share its tensors."""

    def __deepcopy__(self, memo: Any) -> nn.Module:
        new = Sharing.__new__(Sharing)
        new.__dict__.update(self.__dict__)
        new._parameters = dict(self._parameters)
        return new


def test_a_module_whose_copies_share_its_tensors_gets_new_ones() -> None:
    model = nn.Sequential(Sharing(3, 2))
    before, (sites, _, _) = model[0].weight.clone(), sites_of(model)
    forms = {"0.weight": Dense(torch.ones(2, 3)), "0.bias": Dense(torch.zeros(2))}
    twin = write_module(model, forms, sites)
    assert torch.equal(twin(torch.ones(1, 3)), torch.full((1, 2), 3.0))
    assert torch.equal(model[0].weight, before)


def test_a_form_with_a_wrong_shape_is_refused() -> None:
    class Liar(Dense):
        def decode(self, keep: Any = None) -> torch.Tensor:
            return self.array[:1]

    plain = start(nn.Linear(3, 2))
    forms = {**plain.forms, "weight": Liar(torch.ones(2, 3))}
    with pytest.raises(RefusedError, match=r"weight: a form of shape \[2, 3\] decodes to \[1, 3\]"):
        write_module(plain.given, forms, plain.sites)


def test_a_hook_may_change_names() -> None:
    """A wrapper that removes itself from the names: tensors are found by identity."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)
            self.register_state_dict_post_hook(type(self).plain)

        def plain(self, state: dict[str, Any], prefix: str, local: Any) -> None:
            for name in [name for name in state if ".inner." in f".{name}"]:
                state[name.replace("inner.", "")] = state.pop(name)

    model = Wrapper()
    plain = start(model)
    forms = {name: form.take(0, torch.tensor([1])) for name, form in plain.forms.items()}
    twin = write_module(model, forms, plain.sites)
    assert twin.inner.weight.shape == (1, 3)
    assert twin.inner.out_features == 1


def test_buffers_that_share_memory_are_separated() -> None:
    model = nn.Module()
    model.register_buffer("whole", torch.arange(6.0))
    model.register_buffer("part", model.whole[:3])
    plain = start(model)
    twin = write_module(model, {**plain.forms, "part": Dense(torch.ones(2))}, plain.sites)
    assert torch.equal(twin.whole, torch.arange(6.0))
    assert torch.equal(twin.part, torch.ones(2))


def test_other_kinds_of_modules() -> None:
    """A traced graph and an exported program are copied and filled like any module."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(2, 3)
    kinds = [
        torch.fx.symbolic_trace(model),
        torch.export.export(model, (x,)).module(),
    ]
    for kind in kinds:
        plain = sites_of(kind)
        forms = {name: Dense(value * 2) for name, value in plain[1].items()}
        twin = write_module(kind, forms, plain[0])
        want = write_module(model, forms, sites_of(model)[0])
        assert torch.equal(twin(x), want(x))
        assert torch.equal(kind(x), model(x))


# --- any model, and memory ---


def layers(draw: Callable[[Any], Any], width: int) -> tuple[nn.Module, int]:
    """A layer that takes [B, width, T], and its output width."""
    out = draw(st.integers(1, 4))
    return draw(
        st.sampled_from(
            [
                (nn.Conv1d(width, out, 1), out),
                (nn.Conv1d(width, width * out, 3, padding=1, groups=width), width * out),
                (nn.ConvTranspose1d(width, out, 1), out),
                (nn.BatchNorm1d(width), width),
                (nn.GroupNorm(width, width), width),
                (nn.PReLU(width), width),
                (nn.Sequential(nn.Conv1d(width, out, 1), nn.InstanceNorm1d(out, affine=True)), out),
                (nn.utils.parametrizations.weight_norm(nn.Conv1d(width, out, 1)), out),
            ]
        )
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_given_forms_equal_the_model_to_the_bit(data: st.DataObject) -> None:
    width, parts = 3, []
    for _ in range(data.draw(st.integers(1, 6))):
        part, width = layers(data.draw, width)
        parts.append(part)
        if data.draw(st.booleans()) and width == part_width(part):
            parts.append(part)  # the same layer twice
    model = randomized(nn.Sequential(*parts))
    model.to(data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))
    sites, tensors, aliases = sites_of(model)  # for computed weights, the tensors they are computed from
    twin = write_module(
        model, {name: Dense(value.clone()) for name, value in tensors.items()}, sites, aliases
    )
    x = torch.randn(2, 3, 5).to(next(iter(model.parameters())).dtype)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
    assert repr(twin) == repr(model)


def part_width(part: nn.Module) -> int:
    """The width, for layers that keep it; 0 for others."""
    return getattr(part, "num_features", 0) or getattr(part, "num_channels", 0)


PEAK = """
import sys
import torch
from torch import nn
from tersor.forms import Affine, Dense
from tersor.model.module_writer import write_module
from tersor.model.sites import sites_of

def peak():
    for line in open("/proc/self/status"):  # getrusage would include the peak of the parent process
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024

model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))  # 96 MB
sites, tensors, _ = sites_of(model)
forms = {
    name: Affine(Dense(torch.ones(1024, 1024, dtype=torch.int8)), Dense(torch.ones(1024, 1)))
    if sys.argv[1] == "affine" else Dense(value.clone())
    for name, value in tensors.items()
}
one = nn.Sequential(nn.Linear(1024, 1024, bias=False))  # memory set up on the first call is not counted
write_module(one, {"0.weight": forms["0.weight"]}, {"0.weight": sites["0.weight"]})
before = peak()
twin = write_module(model, forms, sites)
print(peak() - before)
"""


@pytest.mark.sampled(form="affine")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("form", ["affine", "dense"])
def test_memory_is_the_decoded_tensors_and_little_more(form: str) -> None:
    """96 MB of weights in 24 layers: the copy, and decoding of a few layers. A full copy of the model that is
    then overwritten would take twice as much."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, form], check=True, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert 80 < float(done.stdout) < 96 + 24


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_changes_to_the_copys_tensors_change_no_form(data: st.DataObject) -> None:
    """Decoded tensors may become the copy's own only if no form holds them."""
    draw = Draw(data.draw, torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    form = draw.weights(draw.pick((4, 10), (1, 7)), 0)
    model = nn.Linear(*reversed(form.shape), bias=False)
    model.to(data.draw(st.sampled_from([torch.float32, torch.float16, torch.float64])))
    sites, _, _ = sites_of(model)
    twin, before = write_module(model, {"weight": form}, sites), form.decode().clone()
    assert torch.equal(twin.weight, before.to(twin.weight.dtype))
    with torch.no_grad():
        twin.weight.fill_(7)
    assert torch.equal(form.decode(), before)
    assert (write_module(model, {"weight": form}, sites).weight != 7).any()
