"""Sizes: every stock layer, cut along every axis, equals a layer of the new size with the same weights."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from tersor.core.state import start
from tersor.errors import RefusedError, SettingError, SiteError
from tersor.forms import Dense, Form
from tersor.model.changes import Change, Replace, Set
from tersor.model.module_writer import write_module
from tersor.model.sites import sites_of
from tersor.model.sizes import TABLE

Cuts = dict[str, tuple[tuple[int, list[int]], ...]]  # site -> (axis, kept indices)


def cut(forms: dict[str, Form], cuts: Cuts) -> dict[str, Form]:
    """The forms after keeping only these indices."""
    new = dict(forms)
    for name, each in cuts.items():
        for axis, kept in each:
            new[name] = new[name].take(axis, torch.tensor(kept))
    return new


@dataclass
class Case:
    """A layer, the indices that stay, and the expected layer, made by hand."""

    layer: Callable[[], nn.Module]
    cuts: Cuts
    by_hand: Callable[[], nn.Module]
    x: tuple[int, ...]
    changes: Sequence[Change] = ()


def randomized(layer: nn.Module) -> nn.Module:
    """The layer with random parameters: norms at their initial values would hide errors."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return layer


ROWS, IN = [0, 2, 3], [1, 2]
BOTH = {"weight": ((0, ROWS), (1, IN)), "bias": ((0, ROWS),)}
OUT = {"weight": ((0, ROWS),), "bias": ((0, ROWS),)}
TURNED = {"weight": ((0, IN), (1, ROWS)), "bias": ((0, ROWS),)}


def norm(*names: str) -> Cuts:
    return dict.fromkeys(names, ((0, ROWS),))


def gates(count: int, width: int, kept: list[int]) -> list[int]:
    return [k * width + unit for k in range(count) for unit in kept]


def hidden(count: int, ends: Sequence[str] = ("",), layers: int = 1, project: int = 0) -> Cuts:
    """Cuts that keep the hidden units ROWS of 5, for a recurrent layer with `count` gates."""
    cuts, kept, width = Cuts(), ROWS, 5
    rows = gates(count, width, kept)
    read = kept if not project else list(range(project))
    deeper = [k * (project or width) + unit for k in range(len(ends)) for unit in read]
    for layer in range(layers):
        for end in ends:
            name = f"l{layer}{end}"
            into: tuple[tuple[int, list[int]], ...] = ((1, deeper),) if layer else ()
            cuts[f"weight_ih_{name}"] = ((0, rows), *into)
            cuts[f"weight_hh_{name}"] = ((0, rows), (1, read))
            cuts[f"bias_ih_{name}"] = cuts[f"bias_hh_{name}"] = ((0, rows),)
            if project:
                cuts[f"weight_hr_{name}"] = ((1, kept),)
    return cuts


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(4, 5), BOTH, lambda: nn.Linear(2, 3), (2, 2)),
    "linear out": Case(lambda: nn.Linear(4, 5), OUT, lambda: nn.Linear(4, 3), (2, 4)),
    "linear in": Case(lambda: nn.Linear(4, 5), {"weight": ((1, IN),)}, lambda: nn.Linear(2, 5), (2, 2)),
    "linear bare": Case(
        lambda: nn.Linear(4, 5, bias=False),
        {"weight": BOTH["weight"]},
        lambda: nn.Linear(2, 3, bias=False),
        (2, 2),
    ),
    "conv1d": Case(lambda: nn.Conv1d(4, 5, 3), BOTH, lambda: nn.Conv1d(2, 3, 3), (2, 2, 7)),
    "conv2d": Case(
        lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1),
        BOTH,
        lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1),
        (2, 2, 7, 7),
    ),
    "conv2d same, reflected": Case(
        lambda: nn.Conv2d(4, 5, 3, padding="same", padding_mode="reflect"),
        BOTH,
        lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"),
        (2, 2, 7, 7),
    ),
    "conv3d": Case(lambda: nn.Conv3d(4, 5, 2), BOTH, lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "transposed1d": Case(
        lambda: nn.ConvTranspose1d(4, 5, 3), TURNED, lambda: nn.ConvTranspose1d(2, 3, 3), (2, 2, 4)
    ),
    "transposed2d": Case(
        lambda: nn.ConvTranspose2d(4, 5, 3, stride=2, output_padding=1),
        TURNED,
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1),
        (2, 2, 4, 4),
    ),
    "transposed3d": Case(
        lambda: nn.ConvTranspose3d(4, 5, 2), TURNED, lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)
    ),
    "grouped, within groups": Case(
        lambda: nn.Conv2d(6, 8, 3, groups=2),
        {"weight": ((0, [0, 3, 4, 6]), (1, [0, 2])), "bias": ((0, [0, 3, 4, 6]),)},
        lambda: nn.Conv2d(4, 4, 3, groups=2),
        (2, 4, 5, 5),
    ),
    "grouped, a group": Case(
        lambda: nn.Conv2d(6, 9, 3, groups=3),
        {"weight": ((0, [0, 1, 2, 6, 7, 8]),), "bias": ((0, [0, 1, 2, 6, 7, 8]),)},
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        (2, 4, 5, 5),
        (Set("0", "groups", 2),),
    ),
    "depthwise": Case(
        lambda: nn.Conv2d(5, 5, 3, groups=5), OUT, lambda: nn.Conv2d(3, 3, 3, groups=3), (2, 3, 5, 5)
    ),
    "depthwise, said": Case(
        lambda: nn.Conv2d(5, 5, 3, groups=5),
        OUT,
        lambda: nn.Conv2d(3, 3, 3, groups=3),
        (2, 3, 5, 5),
        (Set("0", "groups", 3), Set("0", "in_channels", 3)),
    ),
    "depthwise, groups said otherwise": Case(
        lambda: nn.Conv1d(6, 6, 3, groups=6),
        {"weight": ((0, [0, 1, 2, 3]),), "bias": ((0, [0, 1, 2, 3]),)},
        lambda: nn.Conv1d(2, 4, 3, groups=2),
        (2, 2, 5),
        (Set("0", "groups", 2),),
    ),
    "depthwise of two": Case(
        lambda: nn.Conv1d(3, 6, 3, groups=3),
        {"weight": ((0, [0, 1, 4, 5]),), "bias": ((0, [0, 1, 4, 5]),)},
        lambda: nn.Conv1d(2, 4, 3, groups=2),
        (2, 2, 5),
    ),
    "one output a group": Case(
        lambda: nn.Conv1d(10, 5, 3, groups=5), OUT, lambda: nn.Conv1d(6, 3, 3, groups=3), (2, 6, 5)
    ),
    "transposed depthwise": Case(
        lambda: nn.ConvTranspose2d(5, 5, 3, groups=5),
        OUT,
        lambda: nn.ConvTranspose2d(3, 3, 3, groups=3),
        (2, 3, 4, 4),
    ),
    "transposed, two outputs a group": Case(
        lambda: nn.ConvTranspose1d(3, 6, 3, groups=3),
        {"weight": ((0, [0, 2]),), "bias": ((0, [0, 1, 4, 5]),)},
        lambda: nn.ConvTranspose1d(2, 4, 3, groups=2),
        (2, 2, 4),
    ),
    "transposed, grouped": Case(
        lambda: nn.ConvTranspose1d(6, 4, 3, groups=2),
        {"weight": ((0, [0, 1, 3, 5]), (1, [1])), "bias": ((0, [1, 3]),)},
        lambda: nn.ConvTranspose1d(4, 2, 3, groups=2),
        (2, 4, 4),
    ),
    "batch norm": Case(
        lambda: nn.BatchNorm2d(5),
        norm("weight", "bias", "running_mean", "running_var"),
        lambda: nn.BatchNorm2d(3),
        (2, 3, 4, 4),
    ),
    "batch norm, bare": Case(
        lambda: nn.BatchNorm1d(5, affine=False),
        norm("running_mean", "running_var"),
        lambda: nn.BatchNorm1d(3, affine=False),
        (2, 3),
    ),
    "batch norm, untracked": Case(
        lambda: nn.BatchNorm3d(5, track_running_stats=False),
        norm("weight", "bias"),
        lambda: nn.BatchNorm3d(3, track_running_stats=False),
        (2, 3, 2, 2, 2),
    ),
    "instance norm": Case(
        lambda: nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
        norm("weight", "bias", "running_mean", "running_var"),
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (2, 3, 4, 4),
    ),
    "instance norm, bare": Case(
        lambda: nn.InstanceNorm1d(5),
        {},
        lambda: nn.InstanceNorm1d(3),
        (2, 3, 4),
        (Set("0", "num_features", 3),),
    ),
    "group norm": Case(
        lambda: nn.GroupNorm(2, 6),
        {name: ((0, [0, 1, 3, 5]),) for name in ("weight", "bias")},
        lambda: nn.GroupNorm(2, 4),
        (2, 4, 3),
    ),
    "group norm, a group": Case(
        lambda: nn.GroupNorm(3, 6),
        {name: ((0, [0, 1, 4, 5]),) for name in ("weight", "bias")},
        lambda: nn.GroupNorm(2, 4),
        (2, 4, 3),
        (Set("0", "num_groups", 2),),
    ),
    "layer norm": Case(lambda: nn.LayerNorm(5), norm("weight", "bias"), lambda: nn.LayerNorm(3), (2, 3)),
    "layer norm, two axes": Case(
        lambda: nn.LayerNorm((4, 5)),
        dict.fromkeys(("weight", "bias"), ((0, IN), (1, ROWS))),
        lambda: nn.LayerNorm((2, 3)),
        (2, 2, 3),
    ),
    "layer norm, bare": Case(
        lambda: nn.LayerNorm((4, 5), elementwise_affine=False),
        {},
        lambda: nn.LayerNorm((4, 3), elementwise_affine=False),
        (2, 4, 3),
        (Set("0", "normalized_shape.1", 3),),
    ),
    "layer norm, no bias": Case(
        lambda: nn.LayerNorm(5, bias=False), norm("weight"), lambda: nn.LayerNorm(3, bias=False), (2, 3)
    ),
    "rms norm": Case(lambda: nn.RMSNorm(5), norm("weight"), lambda: nn.RMSNorm(3), (2, 3)),
    "embedding": Case(
        lambda: nn.Embedding(5, 4), {"weight": BOTH["weight"]}, lambda: nn.Embedding(3, 2), (3,)
    ),
    "embedding, padded": Case(
        lambda: nn.Embedding(5, 4, padding_idx=3),
        {"weight": BOTH["weight"]},
        lambda: nn.Embedding(3, 2, padding_idx=2),
        (3,),
        (Set("0", "padding_idx", 2),),
    ),
    "embedding, padded, width": Case(
        lambda: nn.Embedding(5, 4, padding_idx=3),
        {"weight": ((1, IN),)},
        lambda: nn.Embedding(5, 2, padding_idx=3),
        (3,),
    ),
    "embedding bag": Case(
        lambda: nn.EmbeddingBag(5, 4), {"weight": BOTH["weight"]}, lambda: nn.EmbeddingBag(3, 2), (1, 3)
    ),
    "prelu": Case(lambda: nn.PReLU(5), norm("weight"), lambda: nn.PReLU(3), (2, 3, 4)),
    "lstm": Case(lambda: nn.LSTM(4, 5), hidden(4), lambda: nn.LSTM(4, 3), (6, 2, 4)),
    "lstm, inputs": Case(
        lambda: nn.LSTM(4, 5), {"weight_ih_l0": ((1, IN),)}, lambda: nn.LSTM(2, 5), (6, 2, 2)
    ),
    "lstm, deep, both ways": Case(
        lambda: nn.LSTM(4, 5, 2, bidirectional=True),
        hidden(4, ("", "_reverse"), 2),
        lambda: nn.LSTM(4, 3, 2, bidirectional=True),
        (6, 2, 4),
    ),
    "lstm, projected": Case(
        lambda: nn.LSTM(4, 5, 2, proj_size=2),
        hidden(4, ("",), 2, project=2),
        lambda: nn.LSTM(4, 3, 2, proj_size=2),
        (6, 2, 4),
    ),
    "gru": Case(lambda: nn.GRU(4, 5), hidden(3), lambda: nn.GRU(4, 3), (6, 2, 4)),
    "rnn": Case(lambda: nn.RNN(4, 5), hidden(1), lambda: nn.RNN(4, 3), (6, 2, 4)),
    **{
        f"{kind.__name__}": Case(
            lambda kind=kind: kind(4, 5),
            {
                "weight_ih": ((0, gates(count, 5, ROWS)), (1, IN)),
                "weight_hh": ((0, gates(count, 5, ROWS)), (1, ROWS)),
                "bias_ih": ((0, gates(count, 5, ROWS)),),
                "bias_hh": ((0, gates(count, 5, ROWS)),),
            },
            lambda kind=kind: kind(2, 3),
            (6, 2),
        )
        for kind, count in ((nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1))
    },
}


def run(layer: nn.Module, shape: tuple[int, ...], *, learn: bool = False) -> list[Tensor]:
    """The layer's outputs for random numbers, or for indices of a table."""
    generator = torch.Generator().manual_seed(7)
    tables = any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in layer.modules())
    x = torch.randint(3, shape, generator=generator) if tables else torch.randn(shape, generator=generator)
    with torch.set_grad_enabled(learn):
        return flat(layer.eval()(x))


def flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [tensor for part in out for tensor in flat(part)]


def integers(module: nn.Module) -> dict[str, Any]:
    """The integers and other plain attributes of a module."""
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (int, tuple, str)) and key[0] != "_"
    }


@pytest.mark.parametrize("what", CASES)
def test_a_cut_layer_equals_a_layer_of_that_size(what: str) -> None:
    case = CASES[what]
    model = nn.Sequential(randomized(case.layer()))
    before = copy.deepcopy(model.state_dict()), integers(model[0])
    plain = start(model)
    forms = cut(dict(plain.forms), {f"0.{name}": each for name, each in case.cuts.items()})
    twin = write_module(model, forms, plain.sites, changes=case.changes)
    hand = nn.Sequential(case.by_hand())
    hand.load_state_dict({name: form.decode() for name, form in forms.items()})
    assert integers(twin[0]) == integers(hand[0])
    for ours, theirs in zip(run(twin, case.x), run(hand, case.x), strict=True):
        assert torch.equal(ours, theirs)
    assert integers(model[0]) == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    if learned := list(twin.parameters()):  # the new shapes can be trained
        torch.stack([out.sum() for out in run(twin, case.x, learn=True)]).sum().backward()
        assert all(parameter.grad is not None for parameter in learned)


@pytest.mark.parametrize("what", CASES)
def test_layers_that_are_not_cut_do_not_change(what: str) -> None:
    model = nn.Sequential(randomized(CASES[what].layer()))
    plain = start(model)
    twin = write_module(model, plain.forms, plain.sites)
    assert integers(twin[0]) == integers(model[0])
    assert {name: value.stride() for name, value in twin.state_dict().items()} == {
        name: value.stride() for name, value in model.state_dict().items()
    }


def test_bilinear() -> None:
    model = nn.Bilinear(4, 3, 5)
    plain = start(model)
    forms = cut(dict(plain.forms), {"weight": ((0, ROWS), (1, IN), (2, [0, 2])), "bias": ((0, ROWS),)})
    twin, hand = write_module(model, forms, plain.sites), nn.Bilinear(2, 2, 3)
    hand.load_state_dict({name: form.decode() for name, form in forms.items()})
    assert integers(twin) == integers(hand)
    x, y = torch.randn(2, 2), torch.randn(2, 2)
    assert torch.equal(twin(x, y), hand(x, y))


def test_every_entry_of_the_table_is_tested() -> None:
    layers = [case.layer() for case in CASES.values()]
    layers += [nn.Bilinear(1, 1, 1), nn.MultiheadAttention(2, 1)]  # here and in test_stock.py
    for kinds, rule in TABLE:
        assert rule.__name__ == "free_attention" or any(isinstance(layer, kinds) for layer in layers), rule


# --- nn.MultiheadAttention: heads and stream are cut together ---


def test_multihead_attention_narrower_with_its_stream() -> None:
    model = nn.MultiheadAttention(8, 4, batch_first=True, add_bias_kv=True)
    stay = [0, 1, 4, 5]
    three = [k * 8 + unit for k in range(3) for unit in stay]
    plain = start(model)
    forms = cut(
        dict(plain.forms),
        {
            "in_proj_weight": ((0, three), (1, stay)), "in_proj_bias": ((0, three),), "bias_k": ((2, stay),),
            "bias_v": ((2, stay),), "out_proj.weight": ((0, stay), (1, stay)), "out_proj.bias": ((0, stay),),
        },
    )  # fmt: skip
    twin = write_module(model, forms, plain.sites, changes=[Set("", "num_heads", 2)])
    hand = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)
    hand.load_state_dict({name: form.decode() for name, form in forms.items()})
    assert integers(twin) == integers(hand)
    assert integers(twin.out_proj) == integers(hand.out_proj)
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        assert torch.equal(twin.eval()(x, x, x)[0], hand.eval()(x, x, x)[0])


def test_multihead_attention_with_other_keys() -> None:
    model = nn.MultiheadAttention(4, 2, kdim=6, vdim=5)
    plain = start(model)
    forms = cut(dict(plain.forms), {"k_proj_weight": ((1, [0, 5]),), "v_proj_weight": ((1, [0, 2, 4]),)})
    twin, hand = write_module(model, forms, plain.sites), nn.MultiheadAttention(4, 2, kdim=2, vdim=3)
    hand.load_state_dict({name: form.decode() for name, form in forms.items()})
    assert integers(twin) == integers(hand)


# --- weights that are computed ---


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm(dim: int) -> None:
    """Its tensors are sites by their names in the state dict."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5), dim=dim), nn.Linear(5, 2))
    sites, tensors, _ = sites_of(model)
    g = "0.parametrizations.weight.original0"
    cuts: Cuts = {
        "0.parametrizations.weight.original1": ((0, ROWS),), "0.bias": ((0, ROWS),), "1.weight": ((1, ROWS),),
        **({g: ((0, ROWS),)} if dim == 0 else {}),
    }  # fmt: skip
    forms = cut({name: Dense(value.clone()) for name, value in tensors.items()}, cuts)
    twin = write_module(model, forms, sites)
    hand = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3), dim=dim), nn.Linear(3, 2))
    hand.load_state_dict({name: form.decode() for name, form in forms.items()})
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), hand(x))
    assert (twin[0].out_features, twin[1].in_features) == (3, 3)
    twin(x).sum().backward()
    assert twin[0].parametrizations.weight.original0.grad is not None


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_older_weight_norm() -> None:
    """copy.deepcopy alone fails: the layer holds a computed tensor."""
    model = nn.Sequential(weight_norm(nn.Linear(4, 5)), weight_norm(nn.LSTM(5, 5), "weight_hh_l0"))
    sites, tensors, _ = sites_of(model)
    forms = {name: Dense(value.clone()) for name, value in tensors.items()}
    x = torch.randn(3, 2, 4)
    assert torch.equal(write_module(model, forms, sites)(x)[0], model(x)[0])
    cuts: Cuts = {"0.weight_v": ((1, IN),)}
    twin = write_module(model, cut(forms, cuts), sites)
    assert (twin[0].in_features, twin[0].out_features) == (2, 5)
    v, g = forms["0.weight_v"].decode()[:, IN], forms["0.weight_g"].decode()
    want = x[..., :2] @ (g * v / v.norm(dim=1, keepdim=True)).T + model[0].bias
    assert torch.allclose(twin[0](x[..., :2]), want, atol=1e-6)


def test_pruned_and_spectral_layers() -> None:
    """torch's pruning keeps weight_orig and weight_mask, spectral_norm weight_orig, weight_u, weight_v."""
    model = nn.Sequential(
        prune.l1_unstructured(nn.Linear(4, 5), "weight", 0.5), spectral_norm(nn.Linear(5, 6))
    ).eval()
    from tersor.forms import Dense

    sites, tensors, _ = sites_of(model)
    forms = {name: Dense(value.clone()) for name, value in tensors.items()}
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(write_module(model, forms, sites)(x), model(x))
        cuts: Cuts = norm("0.weight_orig", "0.weight_mask", "0.bias")
        cuts |= {"1.weight_orig": ((1, ROWS),), "1.weight_v": ((0, ROWS),)}
        twin = write_module(model, cut(forms, cuts), sites)
        assert twin(x).shape == (3, 6)
    assert (twin[0].out_features, twin[1].in_features) == (3, 3)


# --- what does not fit ---

WRONG: dict[str, tuple[Callable[[], nn.Module], Cuts, Sequence[Change], type[Exception], str]] = {
    "half a cut": (
        lambda: nn.Linear(4, 5),
        {"weight": ((0, ROWS),)},
        (),
        RefusedError,
        "weight along axis 0 has 3, bias along axis 0 has 5; they must be cut together",
    ),
    "groups that do not divide": (
        lambda: nn.Conv2d(6, 9, 3, groups=3),
        {"weight": ((0, [0, 1]),), "bias": ((0, [0, 1]),)},
        (),
        RefusedError,
        "2 channels are not divisible by 3; set the number of groups: Set('0', 'groups', n)",
    ),
    "kernels": (
        lambda: nn.Conv1d(2, 2, 3),
        {"weight": ((2, [0, 1]),)},
        (),
        RefusedError,
        "the kernel [3] became [2]; only channels are cut",
    ),
    "transposed bias": (
        lambda: nn.ConvTranspose1d(2, 5, 3),
        {"weight": ((1, ROWS),)},
        (),
        RefusedError,
        "weight has 3 output channels, bias has 5",
    ),
    "an integer against the shapes": (
        lambda: nn.Linear(4, 5),
        BOTH,
        (Set("0", "out_features", 4),),
        RefusedError,
        "0.out_features was set to 4, but the shapes of its tensors imply 3",
    ),
    "a place against the shapes": (
        lambda: nn.LayerNorm((2, 5)),
        {},
        (Set("0", "normalized_shape.1", 4),),
        RefusedError,
        "0.normalized_shape was set to (2, 4), but the shapes of its tensors imply (2, 5)",
    ),
    "group norm": (
        lambda: nn.GroupNorm(2, 6),
        norm("weight", "bias"),
        (),
        RefusedError,
        "3 channels are not divisible by 2; set the number of groups: Set('0', 'num_groups', n)",
    ),
    "layer norm": (
        lambda: nn.LayerNorm(5),
        norm("weight"),
        (),
        RefusedError,
        "weight has shape [3], bias [5]",
    ),
    "a padded table": (
        lambda: nn.Embedding(5, 4, padding_idx=3),
        {"weight": ((0, ROWS),)},
        (),
        RefusedError,
        "rows were cut, and row 3 was the padding row; set the new index: Set('0', 'padding_idx', n)",
    ),
    "one gate": (
        lambda: nn.LSTM(4, 5),
        {"weight_ih_l0": ((0, ROWS),)},
        (),
        RefusedError,
        "weight_ih_l0 along axis 0 has 3, weight_hh_l0 along axis 0 has 20",
    ),
    "gates without what they read": (
        lambda: nn.GRU(4, 5),
        {name: each[:1] for name, each in hidden(3).items()},
        (),
        RefusedError,
        "3 hidden units, but the recurrent weights read 5",
    ),
    "the next layer": (
        lambda: nn.RNN(4, 5, 2),
        hidden(1, ("",), 2) | {"weight_ih_l1": ((0, ROWS),)},
        (),
        RefusedError,
        "layers have 3 outputs, but the next layer reads 5",
    ),
    "a cell": (
        lambda: nn.GRUCell(4, 5),
        {name: ((0, gates(3, 5, ROWS)),) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
        (),
        RefusedError,
        "3 hidden units, but the recurrent weight reads 5",
    ),
    "heads of torch": (
        lambda: nn.MultiheadAttention(8, 4),
        {
            "in_proj_weight": ((0, [0, 1, 8, 9, 16, 17]),),
            "in_proj_bias": ((0, [0, 1, 8, 9, 16, 17]),),
            "out_proj.weight": ((1, [0, 1]),),
        },
        (Set("0", "num_heads", 1),),
        RefusedError,
        "they would have 2 and 8. Replace it first: Replace('0', 'attention')",
    ),
    "heads alone": (
        lambda: nn.MultiheadAttention(8, 4),
        {},
        (Set("0", "num_heads", 3),),
        RefusedError,
        "8 channels are not divisible by 3",
    ),
    "no module": (
        lambda: nn.Linear(4, 5),
        {},
        (Set("00", "groups", 1),),
        SiteError,
        "no module '00'; did you mean '0'",
    ),
    "no attribute": (
        lambda: nn.Conv1d(4, 5, 3),
        {},
        (Set("0", "grops", 1),),
        SiteError,
        "0.grops is not an integer of a Conv1d; did you mean 'groups'?",
    ),
    "not an integer": (
        lambda: nn.Linear(4, 5),
        {},
        (Set("0", "training", 1),),
        SiteError,
        "0.training is not an integer of a Linear",
    ),
    "no place": (
        lambda: nn.LayerNorm(5),
        {},
        (Set("0", "normalized_shape.1", 3),),
        SiteError,
        "0.normalized_shape.1 is not an integer of a LayerNorm",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_cuts_and_settings_that_do_not_fit_are_refused(what: str) -> None:
    layer, cuts, changes, error, says = WRONG[what]
    model = nn.Sequential(layer())
    plain = start(model)
    forms = cut(dict(plain.forms), {f"0.{name}": each for name, each in cuts.items()})
    with pytest.raises(error) as caught:
        write_module(model, forms, plain.sites, changes=changes)
    assert says in str(caught.value)


def test_integers_of_other_modules_are_set() -> None:
    """In tuples and lists, class attributes, on the model itself; other modules are not changed."""

    class Heads(nn.Module):
        width = 4

        def __init__(self) -> None:
            super().__init__()
            self.sizes, self.deep, self.heads = (1, 2), [[1, 2], (3, 4)], 2

    model = nn.Sequential(Heads(), Heads())
    changes = [
        Set("0", "sizes.1", 7), Set("0", "deep.1.0", 8), Set("0", "deep.0.1", 9), Set("0", "width", 5),
        Set("1", "heads", 1), Set("1", "heads", 3),
    ]  # fmt: skip
    twin = write_module(model, {}, {}, changes=changes)
    assert (twin[0].sizes, twin[0].deep, twin[0].width, twin[1].heads) == ((1, 7), [[1, 9], (8, 4)], 5, 3)
    assert (model[0].sizes, model[0].deep, model[0].width, model[1].heads) == ((1, 2), [[1, 2], (3, 4)], 4, 2)
    assert (Heads.width, twin[1].width) == (4, 4)


def test_an_integer_that_the_module_computes_is_refused() -> None:
    class Fixed(nn.Module):
        @property
        def heads(self) -> int:
            return 2

        @heads.setter
        def heads(self, value: int) -> None: ...

    with pytest.raises(RefusedError, match="heads was set to 3, but is 2: the module computes it itself"):
        write_module(Fixed(), {}, {}, changes=[Set("", "heads", 3)])


@pytest.mark.parametrize("value", [1.0, True, "2", None])
def test_only_integers_are_set(value: Any) -> None:
    with pytest.raises(SettingError, match="only integers are allowed"):
        Set("a", "b", value)
    with pytest.raises(SettingError, match="must be an integer or a string"):
        Replace("a", "product", {"layers": [value]})  # type: ignore[dict-item]
