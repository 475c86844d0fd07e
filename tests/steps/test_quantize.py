"""Quantize: the requested grid is stored within its error bound, for every scheme and axis."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError
from tersor.forms import Affine, Codebook, Form, LogGrid, LowRank, Masked
from tersor.maths.uniform_grid import RANGES
from tersor.steps import Cluster, Entropy, Factorize, Finetune, Prune, Quantize

TRANSPOSED = ("up.weight", "back.weight")
MODELS = ("mlp", "conv", "attention", "lstm", "mixed")


def weights_of(result: State) -> list[str]:
    return [name for name, site in result.sites.items() if site.is_weight]


def rows(w: Tensor, name: str) -> Tensor:
    """[O, I], for every layout of the layer."""
    return w.movedim(1 if name in TRANSPOSED else 0, 0).flatten(1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_uniform_rows_are_within_half_a_step(model: str, bits: int, symmetric: bool) -> None:
    t = tiny(model)
    result = run(t.model, Quantize(bits=bits, symmetric=symmetric))
    for name in weights_of(result):
        form, w = result.forms[name], rows(t.model.state_dict()[name], name)
        assert isinstance(form, Affine)
        if name in TRANSPOSED and result.sites[name].groups > 1:
            continue  # its channels are not rows: see the test of transposed convolutions
        assert (form.bits, form.group, form.zero is None) == (bits, 0, symmetric)
        assert form.axis == (1 if name in TRANSPOSED else 0)
        assert form.codes.shape == tuple(t.model.state_dict()[name].shape)
        assert form.codes.decode().dtype is (torch.int8 if bits <= 8 else torch.int16)
        if symmetric:
            step = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        else:
            step = (w.amax(1, keepdim=True).clamp_min(0) - w.amin(1, keepdim=True).clamp_max(0)) / (
                2**bits - 1
            )
        torch.testing.assert_close(form.scale.decode(), step, rtol=1e-5, atol=0)
        error = (rows(form.decode(), name) - w).abs()
        # An asymmetric grid is shifted to hold 0: its ends may be off by another half.
        assert (error <= step * (0.5 if symmetric else 1.0) * (1 + 1e-3)).all()
        assert all(len(row.unique()) <= 2**bits for row in rows(form.decode(), name))


@pytest.mark.parametrize("group", [1, 3, 4, 64])
def test_groups_have_a_scale_each(group: int) -> None:
    t = tiny("mixed")
    result = run(t.model, Quantize(bits=4, per="group", group=group))
    for name in weights_of(result):
        form, w = result.forms[name], rows(t.model.state_dict()[name], name)
        size = min(group, w.shape[1])
        assert form.group == group
        assert form.scale.shape == (w.shape[0], math.ceil(w.shape[1] / size))
        for g in range(form.scale.shape[1]):
            part = w[:, g * size : (g + 1) * size]
            torch.testing.assert_close(form.scale.decode()[:, g], part.abs().amax(1) / 7, rtol=1e-5, atol=0)
            error = (rows(form.decode(), name)[:, g * size : (g + 1) * size] - part).abs()
            assert (error <= form.scale.decode()[:, g : g + 1] * 0.5001).all()


def test_one_scale_for_a_tensor() -> None:
    result = run(tiny("conv").model, Quantize(bits=4, per="tensor"))
    for name in weights_of(result):
        assert result.forms[name].scale.shape == (1, 1)


@pytest.mark.parametrize("range", RANGES)
def test_ranges(range: str) -> None:
    """Large weights may be clipped; "mse" is never worse than "minmax"."""
    t = tiny("conv")
    more: dict[str, Any] = {"percentile": {"percentile": 90.0}, "fixed": {"high": 0.01}}.get(range, {})
    best, found = run(t.model, Quantize(bits=3)), run(t.model, Quantize(bits=3, range=range, **more))
    for name in weights_of(found):
        w = t.model.state_dict()[name]
        errors = [float((r.forms[name].decode() - w).square().sum()) for r in (best, found)]
        if range == "mse":
            assert errors[1] <= errors[0] * (1 + 1e-6)
        else:
            assert (found.forms[name].scale.decode() <= best.forms[name].scale.decode() * (1 + 1e-6)).all()


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_log_levels_are_powers_of_two(bits: int, terms: int) -> None:
    t = tiny("conv")
    result = run(t.model, Quantize(scheme="log", bits=bits, terms=terms))
    for name in weights_of(result):
        form = result.forms[name]
        assert isinstance(form, LogGrid)
        for row, scale in zip(rows(form.decode(), name), form.scale.decode()[:, 0], strict=True):
            levels = (row.abs() / scale).unique().double()
            assert len(levels) <= 2 ** (bits - 1)
            assert levels.max() <= 1
            if terms == 1:
                exponents = torch.log2(levels[levels > 0])
                torch.testing.assert_close(exponents, exponents.round(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_binary_is_plus_and_minus_the_mean(per: str) -> None:
    t = tiny("mixed")
    result = run(t.model, Quantize(scheme="binary", per=per))
    for name in weights_of(result):
        w, seen = (rows(x, name) for x in (t.model.state_dict()[name], result.forms[name].decode()))
        mean = w.abs().mean(1, keepdim=True) if per == "channel" else w.abs().mean()
        torch.testing.assert_close(seen, torch.where(w >= 0, mean, -mean), rtol=1e-5, atol=0)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_ternary_is_the_mean_of_what_is_large(per: str) -> None:
    t = tiny("mixed")
    result = run(t.model, Quantize(scheme="ternary", per=per))
    for name in weights_of(result):
        w, seen = (rows(x, name) for x in (t.model.state_dict()[name], result.forms[name].decode()))
        for part, value in zip(*((w, seen) if per == "channel" else (w[None], seen[None])), strict=True):
            large = part.abs() > 0.7 * part.abs().mean()
            mean = part.abs()[large].mean()
            torch.testing.assert_close(value, part.sign() * mean * large, rtol=1e-5, atol=0)


def test_the_exact_ternary_rule_is_no_worse_than_any_threshold() -> None:
    t = tiny("conv")
    result = run(t.model, Quantize(scheme="ternary", rule="exact", per="tensor"))
    for name in weights_of(result):
        w = t.model.state_dict()[name].flatten().double()
        found = float((result.forms[name].decode().flatten() - w).square().sum())
        sizes = np.sort(np.abs(w.numpy()))[::-1]
        best = min(float((w**2).sum()) - sizes[:k].sum() ** 2 / k for k in range(1, len(sizes) + 1))
        assert found == pytest.approx(best, rel=1e-4)


# --- on compressed weights ---


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"bits": 4, "symmetric": False},
        {"bits": 4, "scheme": "log"},
        {"scheme": "binary"},
        {"scheme": "ternary"},
    ],
    ids=str,
)
def test_masked_weights_stay_zero_and_do_not_change_the_grid(settings: dict[str, Any]) -> None:
    t = tiny("conv")
    cut = run(t.model, Prune(keep=0.4))
    result = run(cut, Quantize(**settings))
    for name in weights_of(result):
        form = result.forms[name]
        assert isinstance(form, Masked)
        mask = form.keep.decode()
        assert torch.equal(mask, cut.forms[name].keep.decode())
        assert not form.decode()[~mask].any()
        assert next(e.how for e in result.ledger.edits(-1) if e.site == name) == "refine"
        # Hidden weights that are ten times as large change neither the scale nor the visible weights.
        step, w = Quantize(**settings), cut.forms[name].decode()
        loud, quiet = (step.store(torch.where(mask, w, hidden), mask, 0) for hidden in (10.0, 0.0))
        assert torch.equal(scale_of(loud), scale_of(quiet))


def scale_of(form: Form) -> Tensor:
    assert isinstance(form, (Affine, LogGrid, Codebook))
    return form.scale.decode()


def test_factors_are_quantized_each() -> None:
    before = run(tiny("conv").model, Factorize(keep=0.5))
    after = run(before, Quantize(bits=4))
    form = after.forms["block.weight"]
    assert isinstance(form, LowRank)
    assert isinstance(form.left, Affine)
    assert isinstance(form.right, Affine)
    assert form.left.scale.shape == (form.left.shape[0], 1)


def test_another_grid_absorbs_the_first() -> None:
    t = tiny("conv")
    for first in (Quantize(bits=3), Cluster(entries=5), Quantize(scheme="binary")):
        twice = run(t.model, [first, Quantize(bits=8)])
        hows = [e.how for e in twice.ledger.edits() if e.step == 1]
        assert set(hows) == {"absorb"}


def test_the_note_says_how_much_noise_there_is() -> None:
    t = tiny("conv")
    result = run(t.model, Quantize(bits=4))
    for entry in result.ledger.notes("done"):
        w = t.model.state_dict()[entry.site].double()
        noise = result.forms[entry.site].decode().double() - w
        want = 10 * math.log10(float((w**2).sum() / (noise**2).sum()))
        assert entry.data["decibels"] == pytest.approx(want, abs=0.01)
        assert entry.text == f"4 bits, signal to noise {want:.1f} dB"


def test_exact_results_are_noted_as_exact() -> None:
    result = run(tiny("mlp").model, [Quantize(bits=8), Quantize(bits=8)])
    texts = [entry.text for entry in result.ledger.notes("done") if entry.step == 1]
    assert texts == ["8 bits, exact"] * 4


# --- trained ---

SCHEMES: list[dict[str, Any]] = [
    {"bits": 2}, {"bits": 4, "symmetric": False, "per": "group", "group": 4}, {"bits": 1, "symmetric": False},
    {"scheme": "log", "bits": 3}, {"scheme": "log", "bits": 4, "terms": 2}, {"scheme": "binary"},
    {"scheme": "ternary"}, {"scheme": "ternary", "rule": "exact"},
]  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("settings", SCHEMES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_training_stays_on_the_grid_and_learns(settings: dict[str, Any], masked: bool) -> None:
    t = tiny("conv")
    given = run(t.model, Prune(keep=0.6)) if masked else t.model
    plain = run(given, Quantize(**settings), t.task)
    result = run(given, Quantize(**settings, epochs=8, lr=0.02), t.task)
    moved = 0
    for name in weights_of(result):
        before, after = plain.forms[name], result.forms[name]
        if masked:
            assert torch.equal(before.keep.decode(), after.keep.decode())
            assert not after.decode()[~after.keep.decode()].any()
            before, after = before.body, after.body
        assert type(after) is type(before)
        assert after.settings() == before.settings()
        moved += not torch.equal(before.decode(), after.decode())
    assert moved == len(weights_of(result))
    batches = list(t.task.batches("calibrate"))
    with torch.no_grad():
        losses = [sum(float(t.task.loss(r.model()(x), y)) for x, y in batches) for r in (plain, result)]
    assert losses[1] < losses[0]


def test_trained_biases_are_not_quantized() -> None:
    t = tiny("conv")
    result = run(t.model, Quantize(bits=4, epochs=1, lr=0.01), t.task)
    assert result.forms["head.bias"].name == "dense"
    assert not torch.equal(result.forms["head.bias"].decode(), t.model.head.bias)
    assert next(e.how for e in result.ledger.edits() if e.site == "head.bias") == "refine"


def test_finetuning_stays_on_the_grid() -> None:
    t = tiny("conv")
    stored = run(t.model, Quantize(bits=3), t.task)
    tuned = run(stored, Finetune(epochs=3, lr=0.01), t.task)
    for name in weights_of(tuned):
        assert isinstance(tuned.forms[name], Affine)
        assert tuned.forms[name].codes.decode().abs().max() <= 3
        assert not torch.equal(tuned.forms[name].decode(), stored.forms[name].decode())


def test_coded_grids_are_tuned_as_plain_ones() -> None:
    t = tiny("mlp")
    plain, coded = (
        run(t.model, [Quantize(bits=4), *extra, Finetune(epochs=1, lr=0.01)], t.task)
        for extra in ([], [Entropy(coder="huffman")])
    )
    # Other seeds, since the training is another step of the recipe; the same structure.
    assert {n: f.name for n, f in plain.forms.items()} == {n: f.name for n, f in coded.forms.items()}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"bits": 0}, "bits=0, but uniform stores 1 to 16"),
    ({"bits": 17}, "bits=17"),
    ({"scheme": "log", "bits": 1}, "bits=1, but log stores 2 to 8"),
    ({"scheme": "log", "bits": 9}, "bits=9"),
    ({"bits": 1}, "scheme=binary"),
    ({"scheme": "terrnary"}, "did you mean 'ternary'?"),
    ({"scheme": "binary", "per": "group"}, "per='group'"),
    ({"per": "column"}, "per='column'"),
    ({"group": 0}, "group=0"),
    ({"range": "minimax"}, "did you mean 'minmax'?"),
    ({"percentile": 50}, "percentile=50"),
    ({"percentile": 101}, "percentile=101"),
    ({"terms": 3}, "terms=3"),
    ({"rule": "best"}, "rule='best'"),
    ({"epochs": -1}, "epochs=-1"),
    ({"teacher_weight": 1.5}, "teacher_weight=1.5"),
    ({"temperature": 0}, "temperature=0"),
    ({"optimizer": "adamm"}, "did you mean 'adam'?"),
]


@pytest.mark.parametrize(("settings", "says"), BAD, ids=str)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as caught:
        Quantize(**settings)
    assert str(caught.value).startswith("quantize: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("scheme", ["uniform", "log"])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(8, 6, 2), (4, 4, 4), (6, 12, 3), (6, 4, 1)])
def test_each_output_channel_of_a_transposed_convolution_has_a_scale(
    inputs: int, outputs: int, groups: int, scheme: str
) -> None:
    """Compared with channels quantized one by one: channel c is index c % n of axis 1, in group c // n."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 3, groups=groups))
        each = outputs // groups
        size = torch.logspace(0, -4, outputs)  # channels of very different size
        for c in range(outputs):
            part = slice(c // each * (inputs // groups), (c // each + 1) * (inputs // groups))
            model[0].weight[part, c % each] *= size[c]
    found = run(model, Quantize(bits=4, scheme=scheme)).state_dict()["0.weight"]
    for c in range(outputs):
        part = slice(c // each * (inputs // groups), (c // each + 1) * (inputs // groups))
        alone = nn.Sequential(nn.Linear(inputs // groups * 9, 1))
        with torch.no_grad():
            alone[0].weight.copy_(model[0].weight[part, c % each].reshape(1, -1))
        wanted = run(alone, Quantize(bits=4, scheme=scheme)).state_dict()["0.weight"]
        torch.testing.assert_close(found[part, c % each].reshape(1, -1), wanted)


def test_the_error_of_large_weights_does_not_overflow() -> None:
    """Squares of 1e30 are no float32. The decibels are those of the same weights near 1."""
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    found = []
    for scale in (1.0, 2.0**100, 2.0**-100):
        layer = nn.Linear(40, 8, bias=False)
        layer.weight.data = w * scale
        (note,) = [e for e in run(layer, Quantize(bits=5)).ledger.entries if e.kind == "done"]
        found.append(note.data["decibels"])
    assert found == pytest.approx([found[0]] * 3, abs=1e-3)


@pytest.mark.parametrize("more", [{}, {"rounding": "gptq"}, {"activations": 8}, {"allowed": "8,4"}], ids=str)
def test_a_fixed_range_that_leaves_zeros_only_is_refused(more: dict[str, Any]) -> None:
    t = tiny("mlp")
    with pytest.raises(RefusedError, match=r"all would become 0\. Give a range as large as the weights'"):
        run(t.model, Quantize(range="fixed", high=1e4, **more), t.task)
    named = [name for name, p in t.model.named_parameters() if p.ndim > 1]
    fine = run(t.model, Quantize(range="fixed", high=1.0, **more), t.task).state_dict()
    assert all(fine[name].any() for name in named)
