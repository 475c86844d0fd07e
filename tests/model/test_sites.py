"""Sites: every entry of the state dict once, by its first name; globs pick them, with near misses."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tiny import MODELS, tiny
from torch import nn

from tersor.core.run import run
from tersor.core.state import start
from tersor.errors import RefusedError, SettingError, SiteError
from tersor.model.module_writer import write_module
from tersor.model.sites import Site, finite, select, sites_of
from tersor.steps import Prune

# (model, site) -> shape, kind, axis of outputs, groups, layer
KNOWN: dict[tuple[str, str], tuple[Any, ...]] = {
    ("mlp", "layers.2.weight"): ((1, 7), "linear", 0, 1, "layers.2"),
    ("mlp", "layers.2.bias"): ((1,), "linear", 0, 1, "layers.2"),
    ("conv", "block.weight"): ((7, 7, 3, 3), "conv", 0, 1, "block"),
    ("conv", "norm0.weight"): ((7,), "other", 0, 1, "norm0"),
    ("conv", "norm0.running_var"): ((7,), "buffer", 0, 1, "norm0"),
    ("conv", "norm0.num_batches_tracked"): ((), "buffer", 0, 1, "norm0"),
    ("attention", "embed.weight"): ((11, 8), "embedding", 0, 1, "embed"),
    ("attention", "place"): ((6, 8), "other", 0, 1, ""),
    ("attention", "mask"): ((6, 6), "buffer", 0, 1, ""),
    ("attention", "multi.in_proj_weight"): ((24, 8), "attention", 0, 1, "multi"),
    ("attention", "multi.out_proj.weight"): ((8, 8), "linear", 0, 1, "multi.out_proj"),
    ("lstm", "cell.weight_hh_l0_reverse"): ((20, 5), "recurrent", 0, 1, "cell"),
    ("mixed", "up.weight"): ((2, 2, 3, 3), "convtranspose", 1, 2, "up"),
    ("mixed", "up.bias"): ((4,), "convtranspose", 0, 2, "up"),
    ("mixed", "grouped.weight"): ((6, 2, 3, 3), "conv", 0, 2, "grouped"),
    ("mixed", "depthwise.weight"): ((6, 1, 3, 3), "conv", 0, 6, "depthwise"),
    ("mixed", "line.weight"): ((5, 7, 3), "conv", 0, 1, "line"),
    ("mixed", "back.weight"): ((5, 3, 2), "convtranspose", 1, 1, "back"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "name"), KNOWN)
def test_known_sites(model: str, name: str) -> None:
    site = sites_of(tiny(model).model)[0][name]
    assert (site.shape, site.kind, site.axis, site.groups, site.layer) == KNOWN[model, name]


@pytest.mark.parametrize("name", MODELS)
def test_sites_and_aliases_are_the_state_dict(name: str) -> None:
    model = tiny(name).model
    sites, tensors, aliases = sites_of(model)
    state = model.state_dict()
    assert list(sites) == [key for key in state if key not in aliases]
    for key, site in sites.items():
        assert (site.name, site.shape, site.torch_dtype) == (key, tuple(state[key].shape), state[key].dtype)
        assert torch.equal(tensors[key], state[key])
    assert sites.keys() == tensors.keys()


def test_tied_tensors_are_one_site_under_the_first_name() -> None:
    sites, _, aliases = sites_of(tiny("attention").model)
    assert aliases == {"head.weight": "embed.weight"}
    assert "head.weight" not in sites


class Shared(nn.Module):
    """One layer under two names, tied parameters, and a buffer that shares a parameter's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again = self.a
        self.b.bias = self.a.bias
        self.register_buffer("view", torch.arange(3.0))
        self.register_buffer("other", self.view)
        self.register_buffer("gone", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.b(self.a(x))) + self.view


def test_a_layer_under_two_names() -> None:
    model = Shared()
    sites, _, aliases = sites_of(model)
    assert list(sites) == ["view", "a.weight", "a.bias", "b.weight"]
    assert aliases == {
        "other": "view", "b.bias": "a.bias", "again.weight": "a.weight", "again.bias": "a.bias",
    }  # fmt: skip
    result = run(model, [Prune(keep=0.5)])
    assert result.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 3)
    with torch.no_grad():
        again = result.model()(x)
    assert torch.equal(again, result.model()(x))
    assert result.model().again is not None


def test_two_parameters_that_share_memory_are_two_sites() -> None:
    """`b.weight.data = a.weight.data` is not kept by a copy of the model, so each is a site."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    result = run(model, [Prune(keep=0.5, per="tensor")])
    assert torch.equal(result.model()[0].weight, result.model()[1].weight)
    x = torch.randn(2, 3)
    plain = start(model)
    assert torch.equal(write_module(model, plain.forms, plain.sites)(x), model(x))


def test_a_view_of_another_tensor_is_a_separate_site() -> None:
    model = nn.Module()
    model.register_buffer("whole", torch.arange(6.0))
    model.register_buffer("part", model.get_buffer("whole")[:3])
    model.register_buffer("turned", model.get_buffer("whole").reshape(2, 3))
    assert list(sites_of(model)[0]) == ["whole", "part", "turned"]


def test_empty_tensors_are_separate_sites() -> None:
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(0, 3))
    assert list(sites_of(model)[0]) == ["a", "b"]


def test_is_weight() -> None:
    def site(shape: tuple[int, ...], dtype: str = "float32", kind: str = "linear") -> Site:
        return Site("w", shape, dtype, kind)

    assert site((2, 2)).is_weight
    assert site((2, 2, 3), "bfloat16", "other").is_weight
    assert not site((2,)).is_weight
    assert not site((2, 2), kind="buffer").is_weight
    assert not site((2, 2), "int64").is_weight
    assert site((2,)).is_parameter
    assert not site((2,), "int64").is_parameter
    assert not site((2,), kind="buffer").is_parameter


def test_parameters_named_like_attributes_of_modules() -> None:
    """Parameters named like methods and attributes of modules are trained like others."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("values", "keys", "sites", "parts", "fold", "net"):
                setattr(self, name, nn.Parameter(torch.ones(5)))
            self.register_buffer("pop", torch.ones(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.values + self.keys + self.sites + self.parts + self.fold + self.net) * self.pop

    t, model = tiny("mlp"), Odd()
    result = run(model, [Prune(where="values", epochs=1, lr=0.1, keep=0.8)], t.task)
    assert not torch.equal(result.state_dict()["net"], model.net)


@pytest.mark.parametrize("thing", [None, 3, "model", nn.Linear, {"w": torch.ones(1)}])
def test_a_model_that_is_not_a_module_is_refused(thing: Any) -> None:
    with pytest.raises(SettingError, match=r"the model is a .*, but it must be a torch\.nn\.Module"):
        sites_of(thing)


@pytest.mark.parametrize("thing", [{"version": 1}, torch.ones(2), None])
def test_a_state_dict_with_other_things_is_refused(thing: Any) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return thing

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(
        RefusedError, match=r"_extra_state: the state dict holds .* Register tensors as buffers"
    ):
        sites_of(Extra(2, 2))


def test_finite() -> None:
    buffer, weight = Site("b", (3,), "float32", "buffer"), Site("w", (3,), "float16", "linear")
    whole = Site("i", (2,), "int64", "buffer")
    fine = {
        "b": torch.tensor([0, torch.inf, -torch.inf]),
        "w": torch.ones(3).half(),
        "i": torch.ones(2).long(),
    }
    sites = {"b": buffer, "w": weight, "i": whole}
    finite(fine, sites)
    with pytest.raises(RefusedError, match="w: 2 of 3 values are NaN or infinite"):
        finite(fine | {"w": torch.tensor([torch.inf, 1, torch.nan]).half()}, sites)
    with pytest.raises(RefusedError, match="b: 1 of 3 values"):
        finite(fine | {"b": torch.tensor([0, torch.inf, torch.nan])}, sites)


# --- select ---

CONV = sites_of(tiny("conv").model)[0]


def names(where: str | Iterable[str], model: str = "conv") -> list[str]:
    return [site.name for site in select(sites_of(tiny(model).model)[0], where, "prune")]


WEIGHTS = ["stem.weight", "block.weight", "head.weight"]
PICKS: list[tuple[Any, list[str]]] = [
    ("*", WEIGHTS),
    ("stem.weight", WEIGHTS[:1]),
    ("head.weight,stem.weight", ["stem.weight", "head.weight"]),
    (["head.weight", "stem.weight"], ["stem.weight", "head.weight"]),
    (("*", "!stem*"), WEIGHTS[1:]),
    ("*,!stem*, !head.weight", ["block.weight"]),
    ("!block*", ["stem.weight", "head.weight"]),
    ("?????.weight", ["block.weight"]),
    ("*.weight", WEIGHTS),
    ("[sh]*.weight", ["stem.weight", "head.weight"]),
    ("norm0*", ["norm0.weight", "norm0.bias"]),
    ("*.bias", ["norm0.bias", "block.bias", "norm1.bias", "head.bias"]),
    ("*,norm0.weight", ["stem.weight", "norm0.weight", "block.weight", "head.weight"]),
    ("*.bias,!norm*", ["block.bias", "head.bias"]),
    ("block*", ["block.weight"]),
    ("*,*", WEIGHTS),
]


@pytest.mark.parametrize(("where", "want"), PICKS, ids=str)
def test_globs(where: Any, want: list[str]) -> None:
    assert names(where) == want


MISSES: list[tuple[Any, str]] = [
    ("stem.wieght", "prune: where='stem.wieght' matches no weight; did you mean 'stem.weight'?"),
    ("stem.wieght", "Allowed: block.bias, block.weight, head.bias"),
    ("norm0.running_var", "matches no weight; did you mean 'norm0."),
    ("*,!sten.weight", "where='!sten.weight' excludes nothing; did you mean 'stem.weight'?"),
    ("*,!*", "prune: where='*,!*' leaves no weight: everything it matches is excluded"),
    ("stem.weight,,block.weight", "where='' matches no weight"),
    ("STEM.weight", "matches no weight; did you mean 'stem.weight'?"),
]


@pytest.mark.parametrize(("where", "says"), MISSES, ids=str)
def test_a_glob_that_matches_nothing_is_an_error_with_near_names(where: Any, says: str) -> None:
    with pytest.raises(SiteError) as caught:
        select(CONV, where, "prune")
    assert says in str(caught.value)


def test_the_list_of_names_stays_short_on_large_models() -> None:
    sites = {f"blocks.{k}.weight": Site(f"blocks.{k}.weight", (2, 2), "float32", "linear") for k in range(99)}
    with pytest.raises(SiteError) as caught:
        select(sites, "blocks.5.wait", "prune")
    text = str(caught.value)
    assert "did you mean 'blocks.5.weight'?" in text
    assert "the model has 99, such as blocks.0.weight, blocks.1.weight" in text
    assert len(text) < 250


def test_a_model_without_floats() -> None:
    model = nn.Module()
    model.register_buffer("n", torch.zeros(3))
    with pytest.raises(SiteError, match="the model has no floating-point parameter"):
        select(sites_of(model)[0], "*", "prune")
