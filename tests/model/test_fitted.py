"""Fitted: forms go into a copy of the model they were made from, in their dtypes, and into no other."""

from pathlib import Path

import pytest
import torch
from tiny import MODELS, tiny
from torch import nn

from tersor.core.recipe import Recipe
from tersor.core.run import Compressed, run, start
from tersor.errors import SiteError
from tersor.forms import Affine, Dense
from tersor.io import load, pack
from tersor.model.fitted import fitted
from tersor.steps import Prune, Quantize


@pytest.mark.parametrize("name", MODELS)
def test_undone_forms_answer_as_the_model(name: str) -> None:
    t = tiny(name)
    plain = start(t.model)
    assert torch.equal(t.out(fitted(t.model, plain.forms, plain.sites)), t.out())


@pytest.mark.parametrize("name", MODELS)
def test_the_copy_has_the_decoded_weights_and_the_model_its_own(name: str) -> None:
    t = tiny(name)
    before = {key: value.clone() for key, value in t.model.state_dict().items()}
    plain = start(t.model)
    forms = {
        key: Dense(form.decode() + 1) if form.decode().is_floating_point() else form
        for key, form in plain.forms.items()
    }
    twin = fitted(t.model, forms, plain.sites)
    assert type(twin) is type(t.model)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, before[key] + 1 if value.is_floating_point() else before[key])
        assert torch.equal(t.model.state_dict()[key], before[key])
        assert value.data_ptr() != t.model.state_dict()[key].data_ptr()


def test_a_fitted_model_trains_and_stays_itself() -> None:
    """Parameters stay parameters; training the copy changes no form."""
    t = tiny("conv")
    plain = start(t.model)
    digests = {name: form.digest for name, form in plain.forms.items()}
    twin = fitted(t.model, plain.forms, plain.sites)
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
    twin = fitted(model, {**plain.forms, "weight": grid}, plain.sites)
    assert twin.weight.dtype is dtype
    assert torch.equal(twin.weight, torch.tensor([[0.1], [3.0]]).to(dtype).expand(2, 4))
    result = run(model, [Prune(keep=0.5)])
    assert {value.dtype for value in result.state_dict().values()} == {dtype}
    assert {value.dtype for value in result.model().state_dict().values()} == {dtype}


def test_tied_weights_are_filled_once_and_stay_tied() -> None:
    t = tiny("attention")
    plain = start(t.model)
    twin = fitted(t.model, plain.forms | {"embed.weight": Dense(torch.ones(11, 8))}, plain.sites)
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


def test_a_refused_model_is_left_alone() -> None:
    plain = start(Longer(3, 4, 2))
    model = Longer(3, 4, 5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SiteError):
        fitted(model, plain.forms, plain.sites)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- ties that differ ---


class Two(nn.Module):
    """Two layers of one shape, tied or not."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        if tied:
            self.b.weight = self.a.weight


def packed(state: dict[str, torch.Tensor], tmp_path: Path) -> Compressed:
    """What a checkpoint of these tensors is loaded as."""
    torch.save(state, tmp_path / "w.pt")
    pack(tmp_path / "w.pt", tmp_path / "m.tersor", Recipe((Quantize(bits=4),)))
    return load(tmp_path / "m.tersor")


@pytest.mark.parametrize("held", [("a.weight",), ("b.weight",), ("a.weight", "b.weight")])
def test_model_that_ties_what_a_checkpoint_holds_once_or_twice(held: tuple[str, ...], tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    loaded = packed({name: weight.clone() for name in held}, tmp_path)
    twin = loaded.model(Two(tied=True))
    assert twin.a.weight is twin.b.weight
    assert torch.equal(twin.a.weight, loaded.state_dict()[held[0]])


def test_model_that_does_not_tie_what_a_checkpoint_ties(tmp_path: Path) -> None:
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


def test_one_name_of_two_is_not_enough_without_a_tie(tmp_path: Path) -> None:
    loaded = packed({"a.weight": torch.ones(3, 3)}, tmp_path)
    with pytest.raises(SiteError, match=r"the model has b\.weight, which the forms lack"):
        loaded.model(Two(tied=False))
