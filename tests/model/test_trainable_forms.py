"""Trainable forms: values, gradients and folded forms of parts; training keeps the structure."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_forms import forms
from tiny import MODELS, tiny
from torch import Tensor, nn

from tersor import Finetune, Task, run
from tersor.core.state import start
from tersor.encode import refine
from tersor.forms import FORMS, Affine, At, Codebook, Dense, Form, LogGrid, LowRank, Masked, Sum, uncoded
from tersor.maths.levels import log_grid
from tersor.maths.signs import binary, ternary
from tersor.maths.uniform_grid import limits, uniform_grid
from tersor.model.trainable_forms import TrainableForms
from tersor.model.trainable_parts import PARTS, MaskedPart, part
from tersor.steps import Quantize

SHAPES = ((1, 1), (7, 1), (1, 7), (4, 3, 2, 2), (6, 10), (5,), (1,), ())
each_form = pytest.mark.parametrize("name", [name for name in FORMS if name != "coded"])


def test_every_form_can_be_trained() -> None:
    """A new form needs a Part in model/trainable_parts.py, or models with it cannot be trained."""
    assert set(FORMS.values()) - set(PARTS) <= {FORMS["coded"], Codebook}


def trainable(name: str | None) -> st.SearchStrategy[Form]:
    """Forms as in training: plain leaves, grids like those of the steps."""
    return forms(name, SHAPES).map(uncoded)


def like_steps(form: Form) -> bool:
    """Whether it has no symmetric grid of one bit, which has one code; steps make none."""
    return not any(
        isinstance(node, Affine) and node.bits == 1 and node.zero is None for _, node in form.walk()
    )


def size(form: Form) -> float:
    """The magnitude of the terms that add up to this form's values."""
    if isinstance(form, Masked):
        return size(form.body)
    if isinstance(form, Sum):
        return size(form.a) + size(form.b)
    if isinstance(form, LowRank):
        return size(form.left) * size(form.right) * form.left.shape[1]
    return max([1.0, *form.decode().abs().flatten().tolist()])


def within(form: Form) -> Form:
    """The form with codes in the grid's limits: a random form may hold the code that symmetric grids omit."""
    fields: dict[str, Any] = {key: within(child) for key, child in form.children().items()}
    if isinstance(form, Affine):
        low, high = limits(form.bits, form.zero is None)
        codes = form.codes.decode()
        fields["codes"] = Dense(codes.clamp(low, high).to(codes.dtype))
    return form.replace(**fields)


@each_form
def test_value_and_folded_form_decode_to_the_same(name: str) -> None:
    @given(trainable(name))
    def check(form: Form) -> None:
        form = within(form)
        if not like_steps(form):
            return
        here = part(form)
        want = form.decode()
        for found in (here.value().detach(), here.fold().decode()):
            assert found.shape == want.shape
            torch.testing.assert_close(found.to(want.dtype), want, rtol=1e-6, atol=1e-6 * size(form))

    check()


@each_form
def test_folding_twice_is_folding_once(name: str) -> None:
    @given(trainable(name))
    def check(form: Form) -> None:
        form = within(form)
        if not like_steps(form):
            return
        once = part(form).fold()
        again = part(once).fold().decode()
        torch.testing.assert_close(again, once.decode(), rtol=1e-6, atol=1e-6 * size(form))

    check()


SIGNS = [(rule, per) for rule in (binary, ternary) for per in ("tensor", "channel")]


@pytest.mark.parametrize(("rule", "per"), SIGNS, ids=[f"{r.__name__} {p}" for r, p in SIGNS])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 7), (6, 5), (5,)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_signs(rule: Any, per: str, shape: tuple[int, ...], masked: bool) -> None:
    """Binary and ternary weights of the step keep their values when training starts."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    rows = w.reshape(1, -1) if w.ndim == 1 else w
    index, scale = rule(rows, per, keep=None if keep is None else keep.reshape(rows.shape))
    book = torch.tensor([-1.0, 1.0] if rule is binary else [-1.0, 0.0, 1.0])
    form: Form = Codebook(Dense(index.reshape(shape)), Dense(book), Dense(scale))
    if keep is not None:
        form = Masked(Dense(keep), form)
    here = part(form)
    torch.testing.assert_close(here.value().detach(), form.decode(), rtol=1e-6, atol=0)
    torch.testing.assert_close(here.fold().decode(), form.decode(), rtol=1e-6, atol=0)
    assert torch.equal(trained(form).body.book.decode() if masked else trained(form).book.decode(), book)


@each_form
def test_gradients_reach_the_leaves(name: str) -> None:
    @given(trainable(name), st.integers(0, 99))
    def check(form: Form, seed: int) -> None:
        here = part(form)
        value = here.value()
        pull = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        (value * pull).sum().backward()
        for key, parameter in here.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key

    check()


# --- gradients against formulas ---


def grad_of(form: Form, pull: Tensor) -> dict[str, Tensor]:
    here = part(form)
    (here.value() * pull).sum().backward()
    return {key: p.grad for key, p in here.named_parameters() if p.grad is not None}


PULL = torch.tensor([[1.0, -2.0, 4.0], [0.5, 8.0, -1.0]])
W = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -0.25]])
KEEP = torch.tensor([[True, False, True], [True, True, False]])


def test_a_dense_leaf_gets_the_gradient_itself() -> None:
    assert torch.equal(grad_of(Dense(W), PULL)["w"], PULL)


def test_only_kept_weights_get_gradients() -> None:
    assert torch.equal(grad_of(Masked(Dense(KEEP), Dense(W)), PULL)["body.w"], PULL * KEEP)


def test_gradients_of_weights_that_share_an_entry_add_up() -> None:
    index = torch.tensor([[0, 2, 0], [1, 2, 0]])
    form = Codebook(Dense(index.to(torch.uint8)), Dense(torch.tensor([0.1, 0.2, 0.3])))
    want = torch.zeros(3).index_add(0, index.flatten(), PULL.flatten())
    assert torch.equal(grad_of(form, PULL)["book"], want)
    rows = Codebook(Dense(index.to(torch.uint8)), Dense(torch.rand(2, 3)))
    want = torch.stack([torch.zeros(3).index_add(0, index[r], PULL[r]) for r in range(2)])
    assert torch.equal(grad_of(rows, PULL)["book"], want)
    masked = Masked(Dense(KEEP), form)
    want = torch.zeros(3).index_add(0, index.flatten(), (PULL * KEEP).flatten())
    assert torch.equal(grad_of(masked, PULL)["body.book"], want)


def test_a_log_grid_and_signs_are_straight_through() -> None:
    codes, scale = log_grid(W, 4, per="tensor")
    assert torch.equal(grad_of(LogGrid(Dense(codes), Dense(scale)), PULL)["w"], PULL)
    for rule, book in ((binary, [-1.0, 1.0]), (ternary, [-1.0, 0.0, 1.0])):
        index, scale = rule(W, "channel")
        form = Codebook(Dense(index), Dense(torch.tensor(book)), Dense(scale))
        assert torch.equal(grad_of(form, PULL)["w"], PULL)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["tensor", "channel", "group"])
def test_a_uniform_grid_has_the_gradients_of_lsq(per: str, symmetric: bool) -> None:
    """Weights that round to a code get the gradient, weights outside none; a scale gets the sum of
    gradient * (round(w / s) - w / s), or of gradient * the end, times 1 / sqrt(N * top)    LSQ section 2.1
    """
    bits, group = 3, 2
    w = torch.tensor([[0.53, -1.07, 2.1], [0.04, 3.1, -0.27]])
    codes, scale, zero = uniform_grid(w, bits, per=per, group=group, symmetric=symmetric)
    form = Affine(
        Dense(codes),
        Dense(scale),
        None if zero is None else Dense(zero),
        bits,
        group if per == "group" else 0,
    )
    here = part(form)
    moved = w * 1.7  # some outside the grid, none on a code
    with torch.no_grad():
        here.w.copy_(moved)
    (here.value() * PULL).sum().backward()
    low, high = limits(bits, symmetric)
    want_w, want_s = torch.zeros(2, 3), torch.zeros(scale.shape)
    for r in range(2):
        for c in range(3):
            at = (r if scale.shape[0] > 1 else 0, c // group if scale.shape[1] > 1 else 0)
            s, z = float(scale[at]), 0 if zero is None else int(zero[at])
            step = float(moved[r, c]) / s + z
            if low <= round(step) <= high:
                want_w[r, c] = PULL[r, c]
                want_s[at] += PULL[r, c] * (round(step) - step)
            else:
                want_s[at] += PULL[r, c] * ((low if step < low else high) - z)
    ease = (w.numel() / scale.numel() * high) ** -0.5
    torch.testing.assert_close(here.w.grad, want_w)
    torch.testing.assert_close(here.steps.factor.grad, want_s * ease, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("product", [False, True])
def test_fine_grids_stay_fine_in_training(bits: int, product: bool) -> None:
    """Adam moves a number by the learning rate, which is a hundred times the scale of 16 bits."""
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(bits))
    codes, scale, _ = uniform_grid(w, bits, per="channel")
    steps = LowRank(Dense(scale), Dense(torch.ones(1, 32))) if product else Dense(scale)
    form = Affine(Dense(codes), steps, None, bits, 1 if product else 0)
    after: Any = trained(form, steps=50, lr=1e-3)
    ratio = after.scale.decode() / steps.decode()
    assert 0.8 < float(ratio.min()) <= float(ratio.max()) < 1.2
    assert not torch.equal(ratio, torch.ones_like(ratio))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_weights_at_the_ends_of_a_grid_get_gradients(bits: int) -> None:
    """A weight stored at an end of the grid may be one unit in the last place outside."""
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(bits))
    codes, scale, zero = uniform_grid(w, bits, per="channel", symmetric=False)
    here = part(Affine(Dense(codes), Dense(scale), Dense(zero), bits))
    here.value().sum().backward()
    assert torch.equal(here.w.grad, torch.ones(16, 32))


def test_factors_get_the_gradients_of_a_product() -> None:
    left, right = torch.rand(2, 2), torch.rand(2, 3)
    found = grad_of(LowRank(Dense(left), Dense(right)), PULL)
    torch.testing.assert_close(found["left.w"], PULL @ right.T)
    torch.testing.assert_close(found["right.w"], left.T @ PULL)


# --- training keeps the structure ---


def trained(form: Form, steps: int = 5, lr: float = 0.3, pull: Tensor | None = None) -> Form:
    here = part(form)
    if not list(here.parameters()):
        return here.fold()
    optimizer = torch.optim.AdamW(here.parameters(), lr=lr, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        ((here.value() - 1).square() if pull is None else here.value() * pull).sum().backward()
        optimizer.step()
    return here.fold()


def kinds(form: Form) -> object:
    return (form.name, form.settings(), {key: kinds(child) for key, child in form.children().items()})


@each_form
def test_training_keeps_the_tree_and_the_frozen_arrays(name: str) -> None:
    @given(trainable(name))
    def check(form: Form) -> None:
        after = trained(form)
        assert kinds(after) == kinds(form)
        assert after.decode().isfinite().all()
        old = dict(form.walk())
        for path, node in after.walk():
            before: Any = old[path]
            assert node.shape == before.shape
            for key, array in node.arrays().items():
                assert array.dtype == before.arrays()[key].dtype
                assert array.is_contiguous()
            if isinstance(node, Masked):
                assert torch.equal(node.keep.decode(), before.keep.decode())
                assert not node.decode()[~node.keep.decode()].any()
            if isinstance(node, Affine) and node.zero is not None:
                assert torch.equal(node.zero.decode(), before.zero.decode())
            if isinstance(node, Codebook):
                assert torch.equal(node.index.decode(), before.index.decode())
            if isinstance(node, LogGrid):
                assert torch.equal(node.scale.decode(), before.scale.decode())

    check()


def test_training_changes_every_kind_of_form() -> None:
    """The test above would also pass for parts that never change."""
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    codes, scale, _ = uniform_grid(w, 4)
    log, log_scale = log_grid(w, 4)
    index, sign_scale = ternary(w)
    thin = LowRank(Dense(w[:, :2]), Dense(w[:2]))
    index_of = Dense((torch.arange(24) % 4).reshape(4, 6).to(torch.uint8))
    for form in (
        Dense(w), Masked(Dense(w > 0), Dense(w)), Affine(Dense(codes), Dense(scale), bits=4),
        LogGrid(Dense(log), Dense(log_scale)), Codebook(index_of, Dense(torch.randn(4))),
        Codebook(Dense(index), Dense(torch.tensor([-1.0, 0, 1])), Dense(sign_scale)), thin,
        Sum(Dense(w), thin),
    ):  # fmt: skip
        before, after = ((f.decode() - 1).square().sum() for f in (form, trained(form, 40, 0.1)))
        assert after < 0.9 * before, form


def test_a_product_stays_a_product() -> None:
    thin = LowRank(Dense(torch.randn(8, 2)), Dense(torch.randn(2, 3, 3, 3)))
    after = trained(thin)
    assert torch.linalg.matrix_rank(after.decode().flatten(1)) <= 2
    assert after.left.shape == (8, 2)


def test_masked_weights_are_stored_as_zero() -> None:
    after = trained(Masked(Dense(KEEP), Dense(W)))
    assert not after.body.decode()[~KEEP].any()


def test_a_mask_that_narrows_while_training_is_folded() -> None:
    here = part(Masked(Dense(torch.ones(2, 3, dtype=torch.bool)), Dense(W)))
    assert isinstance(here, MaskedPart)
    here.keep &= KEEP
    assert torch.equal(here.fold().decode(), W * KEEP)
    assert torch.equal(here.value().detach(), W * KEEP)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_leaves_keep_their_dtype(dtype: torch.dtype) -> None:
    w = torch.randn(3, 4).to(dtype)
    here = part(Dense(w))
    assert here.fold().decode().dtype is dtype
    assert torch.equal(here.fold().decode(), w)
    assert here.value().dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_tiny_weights_keep_their_grid() -> None:
    """Scales below 1e-12 work."""
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * 1e-20
    codes, scale, _ = uniform_grid(w, 8)
    form = Affine(Dense(codes), Dense(scale))
    torch.testing.assert_close(part(form).fold().decode(), form.decode(), rtol=1e-5, atol=0)
    torch.testing.assert_close(part(form).value().detach(), form.decode(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [1, 4, 16])
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-12, 1.0, 1e30])
def test_gradients_are_finite_for_all_scales(bits: int, scale: float) -> None:
    """A row of zeros has the smallest scale; its weights can still be trained."""
    form = Affine(Dense(torch.zeros(2, 3, dtype=torch.int16)), Dense(torch.full((2, 1), scale)), None, bits)
    here = part(form)
    for size in (0.0, 0.01, -1e4):
        with torch.no_grad():
            here.w.fill_(size)
        here.zero_grad()
        (here.value() * PULL).sum().backward()
        assert here.value().isfinite().all()
        assert here.w.grad.isfinite().all()
        assert here.steps.factor.grad.isfinite().all()


# --- the trainable model ---


@pytest.mark.parametrize("name", MODELS)
def test_a_trainable_model_agrees_with_the_model(name: str) -> None:
    t = tiny(name)
    given = start(t.model)
    learn = [key for key, site in given.sites.items() if site.is_parameter]
    tuned = TrainableForms(t.model, given.forms, given.sites, learn)
    torch.testing.assert_close(t.out(tuned), t.out())
    assert {key: form.digest for key, form in tuned.fold().items()} == {
        key: given.forms[key].digest for key in learn
    }
    some = TrainableForms(t.model, given.forms, given.sites, learn[:1])
    torch.testing.assert_close(t.out(some), t.out())
    assert len(list(some.parameters())) == 1
    assert list(some.fold()) == learn[:1]


def test_only_changed_buffers_are_folded() -> None:
    t = tiny("conv")
    given = start(t.model)
    tuned = TrainableForms(t.model, given.forms, given.sites, ["head.bias"]).train()
    tuned(t.x)
    assert set(tuned.fold()) == {"head.bias"} | {
        f"norm{k}.{key}" for k in (0, 1) for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert int(tuned.fold()["norm0.num_batches_tracked"].decode()) == 1
    assert torch.equal(given.forms["norm0.running_mean"].decode(), t.model.norm0.running_mean)


class Rebound(nn.Module):
    """Its forward assigns a new tensor to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y - self.mean


def test_a_buffer_that_forward_reassigns_is_kept() -> None:
    model, x = Rebound(), torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    given = start(model)
    tuned = TrainableForms(model, given.forms, given.sites, ["layer.weight"]).train()
    for _ in range(3):
        assert torch.equal(tuned(x), model(x))
    assert torch.equal(tuned.fold()["mean"].decode(), model.mean)
    assert model.mean.abs().sum() > 0


def test_tied_weights_are_trained_together() -> None:
    t = tiny("attention")
    given = start(t.model)
    tuned = TrainableForms(t.model, given.forms, given.sites, ["embed.weight"]).train()
    tuned(t.x).square().sum().backward()
    want = tiny("attention").model.train()
    want(t.x).square().sum().backward()
    torch.testing.assert_close(tuned.part_of("embed.weight").w.grad, want.embed.weight.grad)


def test_recurrent_layers_use_the_trained_weights() -> None:
    """LSTM keeps a list of its weights besides its parameters."""
    t = tiny("lstm")
    given = start(t.model)
    tuned = TrainableForms(t.model, given.forms, given.sites, ["cell.weight_hh_l0"])
    with torch.no_grad():
        tuned.part_of("cell.weight_hh_l0").w.zero_()
    model = tiny("lstm").model
    with torch.no_grad():
        model.cell.weight_hh_l0.zero_()
    torch.testing.assert_close(t.out(tuned), t.out(model))
    assert not torch.equal(t.out(tuned), t.out())


def test_the_given_model_is_not_changed() -> None:
    t = tiny("conv")
    given = start(t.model)
    before = {key: value.clone() for key, value in t.model.state_dict().items()}
    tuned = TrainableForms(t.model, given.forms, given.sites, ["head.weight", "stem.weight"]).train()
    tuned(t.x).sum().backward()
    assert not t.model.training
    assert all(p.grad is None for p in t.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in t.model.state_dict().items())


def test_layers_in_channels_last_have_the_same_gradients() -> None:
    t = tiny("conv")
    given = start(t.model)
    grads = []
    for layout in (torch.contiguous_format, torch.channels_last):
        tuned = TrainableForms(t.model, given.forms, given.sites, ["block.weight"])
        tuned.layout = layout
        tuned(t.x).square().sum().backward()
        grads.append(tuned.part_of("block.weight").w.grad)
        assert tuned.part_of("block.weight").fold().decode().is_contiguous()
    torch.testing.assert_close(*grads)


def test_a_module_without_parameters_folds_to_nothing() -> None:
    given = start(nn.Sequential(nn.ReLU()))
    assert TrainableForms(nn.Sequential(nn.ReLU()), given.forms, given.sites, []).fold() == {}


# --- starting from finer weights ---

FINE = torch.randn(6, 10, generator=torch.Generator().manual_seed(7))
KEPT = torch.rand(6, 10, generator=torch.Generator().manual_seed(8)) < 0.6
STORED: dict[str, Quantize] = {
    "uniform": Quantize(bits=3),
    "asymmetric groups": Quantize(bits=4, symmetric=False, per="group", group=4),
    "log": Quantize(scheme="log", bits=4),
    "two terms": Quantize(scheme="log", bits=5, terms=2, range="mse"),
    "binary": Quantize(scheme="binary"),
    "ternary": Quantize(scheme="ternary"),
    "ternary exact": Quantize(scheme="ternary", rule="exact", per="tensor"),
}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("masked", [False, True])
def test_a_rounded_part_starts_between_its_levels(name: str, masked: bool) -> None:
    """It holds the finer weights, and its value does not change."""
    before: Form = Masked(Dense(KEPT), Dense(FINE)) if masked else Dense(FINE)
    after, _ = refine(before, STORED[name].store)
    here = part(after)
    here.begin(before)
    held = (here.body if masked else here).w.detach()
    assert torch.equal(held * KEPT if masked else held, before.decode())
    torch.testing.assert_close(here.value().detach(), after.decode(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(here.fold().decode(), after.decode(), rtol=1e-6, atol=1e-7)


def test_each_factor_starts_from_its_own_weights() -> None:
    before = LowRank(Dense(FINE[:, :2]), Dense(FINE[:2]))
    after, _ = refine(before, Quantize(bits=3).store)
    here = part(after)
    here.begin(before)
    assert torch.equal(here.left.w.detach(), FINE[:, :2])
    assert torch.equal(here.right.w.detach(), FINE[:2])


def test_each_term_of_a_sum_starts_from_its_own_weights() -> None:
    before = Sum(Dense(FINE), Masked(Dense(KEPT), Dense(FINE / 3)))
    after, _ = refine(before, Quantize(bits=3).store)
    here = part(after)
    here.begin(before)
    assert torch.equal(here.a.w.detach(), FINE)
    assert torch.equal(here.b.body.w.detach() * KEPT, FINE / 3 * KEPT)


def test_parts_know_the_axis_of_their_rows() -> None:
    w, keep = Dense(FINE), Dense(torch.ones_like(FINE, dtype=torch.bool))
    form = Masked(keep, Sum(Masked(keep, w), LowRank(Masked(keep, w), Dense(FINE.T.contiguous()))))
    here = part(At(form, axis=1))
    assert [one.axis for one in (here, here.body, here.body.a, here.body.a.body)] == [1] * 4
    assert [one.axis for one in (here.body.b, here.body.b.left, here.body.b.left.body)] == [1, 0, 0]


def test_parts_that_do_not_round_ignore_begin() -> None:
    w = Dense(FINE)
    for form in (
        Dense(FINE / 2), LowRank(Dense(FINE[:, :2]), Dense(FINE[:2])), Sum(w, w),
        Codebook(Dense((FINE > 0).to(torch.uint8)), Dense(torch.tensor([-1.0, 2.0]))),
    ):  # fmt: skip
        here = part(form)
        here.begin(w)
        assert torch.equal(here.value().detach(), form.decode())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("steps", [[], [Quantize(bits=4)]], ids=["plain", "grid"])
def test_sparse_embeddings_have_dense_gradients_in_training(kind: Any, steps: list[Any]) -> None:
    """sparse=True needs special optimizers; Adam and grids do not support it."""
    moved = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(kind(9, 4, sparse=sparse), nn.Linear(4, 3))
        ids = torch.randint(9, (8, 5) if kind is nn.EmbeddingBag else (8,))
        batch = (ids, torch.randint(3, (8,)))
        task = Task(evaluate=[batch], train=[batch])
        moved.append(run(net, [*steps, Finetune(epochs=3, lr=0.1)], task).state_dict())
        assert net[0].sparse is sparse
    torch.testing.assert_close(*moved, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_clipped_gradients_train_as_far_as_those_of_floats(bits: int) -> None:
    """The gradients of a grid's steps must not fill the norm that max_grad_norm bounds."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(64, 16)
    on = Task("t", train=[(x, x[:, :4].argmax(1))], evaluate=[(x, x[:, :4].argmax(1))])
    how: dict[str, Any] = {"epochs": 20, "lr": 0.1, "optimizer": "sgd", "max_grad_norm": 0.2}
    trained, plain = run(net, Quantize(bits=bits, **how), on).model(), run(net, Finetune(**how), on).model()
    far, want = (float((model[0].weight - net[0].weight).detach().norm()) for model in (trained, plain))
    assert far > 0.7 * want
