"""A user's own training loop: the structure is kept, and the learned values come back."""

import copy
import inspect
import io
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODELS, Tiny, tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tersor import (
    STEPS,
    Cluster,
    Entropy,
    Factorize,
    Finetune,
    Measure,
    Prune,
    Quantize,
    RefusedError,
    SettingError,
    State,
    folded,
    load,
    lock,
    run,
    save,
    trainable,
    undo,
)  # fmt: skip
from tersor.core.state import start
from tersor.errors import SiteError
from tersor.forms import Affine, Codebook, Dense, LowRank, Masked
from tersor.forms.grid import Grid
from tersor.steps.recipe_text import dump, from_yaml

EACH = pytest.mark.parametrize("name", MODELS)


def loop(module: nn.Module, t: Tiny, steps: int = 20, lr: float = 0.02) -> None:
    """An example of a loop: Adam on the training data."""
    x, y = (torch.cat(part) for part in zip(*t.task.batches("calibrate"), strict=True))
    optimizer = torch.optim.Adam(module.parameters(), lr=lr, weight_decay=0.01)
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        out = module(x)
        cross_entropy(out, y).backward()
        optimizer.step()


def zeros(state: State) -> float:
    found = [state.state_dict()[name].flatten() for name, site in state.sites.items() if site.is_weight]
    return float((torch.cat(found) == 0).float().mean())


def answers(state: State, t: Tiny) -> Tensor:
    return t.out(state.model())


@EACH
def test_a_plain_loop_keeps_zeros_zero_and_learns(name: str) -> None:
    t = tiny(name)
    state = run(t.model, Prune(keep=0.3))
    module = trainable(state)
    before = [m.training for m in t.model.modules()], copy.deepcopy(t.model.state_dict())
    loop(module, t)
    after = folded(module)
    assert zeros(after) == pytest.approx(zeros(state), abs=1e-9)
    assert 0.6 < zeros(state) < 0.8
    for site, form in state.forms.items():
        if isinstance(form, Masked):
            assert torch.equal(after.forms[site].keep.decode(), form.keep.decode())
    assert {entry.site for entry in after.ledger.edits(-1)} >= set(dict(t.model.named_parameters())) & set(
        after.sites
    )
    torch.testing.assert_close(answers(after, t), t.out(module), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(answers(after, t), answers(state, t), atol=1e-3)
    assert before[0] == [m.training for m in t.model.modules()]
    assert all(torch.equal(value, before[1][key]) for key, value in t.model.state_dict().items())


STEPS_OF: dict[str, tuple[Any, type]] = {
    "tables": (Cluster(entries=4), Codebook),
    "grids": (Quantize(bits=4), Affine),
    "factors": (Factorize(rank=1), LowRank),
    "coded": ([Prune(keep=0.4), Quantize(bits=4), Entropy()], Masked),
}


@pytest.mark.parametrize("kind", STEPS_OF)
def test_every_structure_is_kept(kind: str) -> None:
    t, (steps, form) = tiny("conv"), STEPS_OF[kind]
    state = run(t.model, steps)
    after = folded(loopy(state, t))
    assert isinstance(after.forms["block.weight"], form)
    assert after.ledger.step_names()[-1] == "trained"
    value = after.state_dict()["block.weight"]
    if kind == "tables":
        assert len(value.unique()) <= 4
    if kind == "factors":
        assert int(torch.linalg.matrix_rank(value.flatten(1))) == 1
    if kind in ("grids", "coded"):
        assert all(len(row.unique()) <= 16 for row in value)


def loopy(state: State, t: Tiny) -> nn.Module:
    module = trainable(state)
    loop(module, t)
    return module


def test_the_same_training_as_the_built_in_loop_gives_the_same_weights() -> None:
    t = tiny("mlp")
    batches = list(t.task.batches("calibrate"))
    state = run(t.model, [Prune(keep=0.5), Quantize(bits=5)])
    step = Finetune(epochs=4, lr=0.03, schedule="constant")
    built = run(state, step, replace(t.task, train=batches))
    module = trainable(state)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.03, weight_decay=0.0)
    for x, y in batches * 4:
        optimizer.zero_grad()
        cross_entropy(module(x), y).backward()
        optimizer.step()
    found = folded(module)
    for name, value in built.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-5, atol=1e-6)


# --- a module like any other ---


def test_it_has_the_models_signature_and_no_more_than_its_own_methods() -> None:
    t = tiny("attention")
    module = trainable(run(t.model, Prune()))
    assert inspect.signature(module.forward) == inspect.signature(t.model.forward)
    assert module.training
    for name in ("config", "gradient_checkpointing_enable", "mask", "embed"):
        assert not hasattr(module, name)


@EACH
def test_it_pickles_copies_saves_and_loads(name: str) -> None:
    t = tiny(name)
    module = trainable(run(t.model, [Prune(keep=0.5), Quantize(bits=6)]))
    loop(module, t, 3)
    want = folded(module).digest
    other = trainable(run(t.model, [Prune(keep=0.5), Quantize(bits=6)]))
    assert folded(other).digest != want
    other.load_state_dict(module.state_dict())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    unpickled = torch.load(file, weights_only=False)
    for one in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), unpickled):
        assert folded(one).digest == want
        assert torch.equal(t.out(one), t.out(module))
        loop(one, t, 1)
        assert folded(one).digest != want
    assert folded(module).digest == want
    assert copy.deepcopy(module).source is module.source  # a state is never changed: copies share it


def test_it_moves() -> None:
    t = tiny("conv")
    module = trainable(run(t.model, Prune())).to("meta")
    assert {p.device.type for p in (*module.parameters(), *module.buffers())} == {"meta"}
    assert module(t.x.to("meta")).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [Prune(keep=0.4), Quantize(bits=6), Cluster(entries=8)], ids=str)
def test_it_runs_in_half_precision(dtype: torch.dtype, step: Any) -> None:
    """As the plain model does in that dtype: the same weights, rounded."""
    t = tiny("mlp")
    state = run(t.model, step)
    module = trainable(state).to(dtype)
    out, expected = module(t.x.to(dtype)), state.model().to(dtype)(t.x.to(dtype))
    assert out.dtype is dtype
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert folded(module).forms.keys() == state.forms.keys()
    assert module.float()(t.x).dtype is torch.float32


def broken(how: str, module: Any) -> None:
    """Break the module in a way that a loop can."""
    part = next(one for one in module.modules() if "w" in one._parameters)
    if how == "meta":
        module.to("meta")
    elif how == "removed":
        del part.w
    elif how == "none":
        part.w = None
    elif how == "shape":
        part.w = nn.Parameter(torch.zeros(3, 3))
    elif how == "sparse":
        part.w = nn.Parameter(part.w.detach().to_sparse())
    elif how == "complex":
        part.w = nn.Parameter(part.w.detach().to(torch.complex64))
    elif how == "float8":
        part.w = nn.Parameter(part.w.detach().to(torch.float8_e4m3fn))
    elif how == "mask":
        del next(one for one in module.modules() if "keep" in one._buffers).keep
    elif how == "assigned":
        empty = {name: value.to("meta") for name, value in module.state_dict().items()}
        module.load_state_dict(empty, assign=True)


SAYS = {
    "meta": "is a meta tensor", "removed": "was removed", "none": "was removed", "mask": "keep was removed",
    "shape": r"has the shape \[3, 3\], and had", "sparse": "layout torch.sparse_coo",
    "complex": "is torch.complex64, and was torch.float32", "assigned": "is a meta tensor",
    "float8": "is torch.float8_e4m3fn, and was torch.float32",
}  # fmt: skip


@pytest.mark.parametrize("how", SAYS)
def test_a_module_that_lost_its_tensors_is_refused(how: str) -> None:
    t = tiny("mlp")
    state = run(t.model, [Prune(keep=0.4), Quantize(bits=6)])
    module = trainable(state)
    broken(how, module)
    with pytest.raises(RefusedError, match=f"^folded: .*{SAYS[how]}.*Fold the module that trainable"):
        folded(module)


def test_what_a_loop_may_do_to_a_module_is_folded() -> None:
    """Reassigned, parametrized, loaded: the tensors are there, with other values."""
    t = tiny("mlp")
    state = run(t.model, [Prune(keep=0.4), Quantize(bits=6)])
    module = trainable(state)
    part = next(one for one in module.modules() if "w" in one._parameters)
    part.w = nn.Parameter(part.w.detach() * 1)
    torch.nn.utils.parametrizations.weight_norm(part, "w")
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    assert folded(module).forms.keys() == state.forms.keys()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_it_trains_under_ddp_and_accelerate(group: None) -> None:
    t = tiny("conv")
    t.model.drop.p = 0.0
    state = run(t.model, [Prune(keep=0.4), Quantize(bits=6)])
    plain, inside, outside = trainable(state), trainable(state), trainable(state)
    loop(plain, t, 4)
    ddp = nn.parallel.DistributedDataParallel(inside)
    loop(ddp, t, 4)
    assert folded(ddp).digest == folded(inside).digest == folded(plain).digest
    from accelerate import Accelerator

    prepared = Accelerator(cpu=True).prepare(outside)
    loop(prepared, t, 4)
    assert folded(prepared).digest == folded(plain).digest


def test_what_torch_compile_made_is_folded() -> None:
    t = tiny("mlp")
    module = trainable(run(t.model, Prune(keep=0.4)))
    compiled = torch.compile(module, backend="eager")
    loop(compiled, t, 3)
    assert folded(compiled).digest == folded(module).digest


# --- edges ---


def test_grids_on_edges_are_in_force_learn_and_come_back_fresh() -> None:
    t = tiny("conv")
    edges = ["norm0/batch_norm:0", "/relu:0"]
    grids = dict.fromkeys(edges, Grid(Dense(torch.tensor([0.2])), None, 4, True))
    state = replace(run(t.model, Prune(keep=0.5)), grids=grids)
    with pytest.raises(SettingError, match="give example=lambda net: net"):
        trainable(state)
    module = trainable(state, example=lambda net: net(t.x))
    assert torch.equal(t.out(module), answers(state, t))
    loop(module, t)
    after = folded(module)
    assert not any(grid.stale for grid in after.grids.values())
    for edge in edges:
        assert not torch.equal(after.grids[edge].scale.decode(), grids[edge].scale.decode())
    torch.testing.assert_close(answers(after, t), t.out(module), rtol=1e-5, atol=1e-6)
    stale = replace(state, grids={edge: grid.replace(stale=True) for edge, grid in grids.items()})
    with pytest.raises(RefusedError, match="its grid is stale"):
        trainable(stale, example=lambda net: net(t.x))


# --- a step in the ledger ---


def test_the_folded_state_can_be_continued_and_saved(tmp_path: Path) -> None:
    t = tiny("mlp")
    state = run(t.model, Prune(keep=0.5))
    after = folded(loopy(state, t))
    assert after.ledger.step_names() == ["prune", "trained"]
    (note,) = after.ledger.notes("trained")
    assert note.text == "in a loop of one's own: 8 moved"
    assert after.ledger.digest == folded(loopy(state, t)).ledger.digest
    whole = run(after, [Entropy(), Measure()], t.task)
    save(whole, tmp_path / "a.tersor")
    again = load(tmp_path / "a.tersor")
    assert again.digest == whole.digest
    assert again.ledger.step_names() == ["prune", "trained", "entropy", "measure"]
    assert undo(whole).digest == start(t.model).digest
    on = trainable(again, t.model)
    loop(on, t, 2)
    assert folded(on).ledger.step_names()[-1] == "trained"
    text = dump(lock(whole))
    with pytest.raises(SettingError, match="'trained' was a user's own training loop"):
        from_yaml(text, STEPS)


def test_a_module_that_does_not_fit_a_file_is_refused_before_the_loop(tmp_path: Path) -> None:
    save(run(nn.Linear(5, 3), Prune()), tmp_path / "a.tersor")
    for other in (nn.Linear(3, 3), nn.Sequential(nn.Linear(5, 3)), nn.Linear(5, 3, bias=False)):
        with pytest.raises(SiteError):
            trainable(load(tmp_path / "a.tersor"), other)


def test_a_module_that_did_not_learn_changes_nothing() -> None:
    state = run(tiny("mlp").model, Prune(keep=0.5))
    after = folded(trainable(state))
    assert after.digest == state.digest
    assert not list(after.ledger.edits(-1))


def test_what_is_not_finite_is_refused() -> None:
    t = tiny("mlp")
    module = trainable(run(t.model, Prune(keep=0.5)))
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    with pytest.raises(RefusedError, match="it became NaN or infinite in training"):
        folded(module)


def test_other_modules_are_refused_with_the_way_out() -> None:
    t = tiny("mlp")
    state = run(t.model, Prune(keep=0.5))
    with pytest.raises(SettingError, match=r"given a Mlp, .* Give what trainable\(\.\.\.\) made"):
        folded(t.model)
    with pytest.raises(SettingError, match=r"given a Sequential, .* Give the submodule that"):
        folded(nn.Sequential(trainable(state)))
    with pytest.raises(SettingError, match="state is a Mlp, but it is a state"):
        trainable(t.model)
    with pytest.raises(SettingError, match=r"frozen='sta'; did you mean 'stay'"):
        trainable(state, frozen="sta")
    with pytest.raises(SettingError, match="a file holds weights, not code"):
        trainable(replace(state, given=None))


# --- trainers ---


@pytest.mark.extra
def test_lightning_trains_it(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    t = tiny("conv")
    state = run(t.model, [Prune(keep=0.3), Cluster(entries=6)])

    class Mine(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = trainable(state)

        def training_step(self, batch: Any, number: int) -> Tensor:
            x, y = batch
            return cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.02)

    mine = Mine()
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(mine, t.task.train)
    after = folded(mine.net)
    assert zeros(after) == pytest.approx(zeros(state))
    assert len(after.state_dict()["block.weight"].unique()) <= 7
    assert {"block.weight", "norm0.running_mean"} <= {entry.site for entry in after.ledger.edits(-1)}


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("thrifty", [False, True])
def test_the_hugging_face_trainer_trains_it(
    thrifty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # Accelerate stores its arguments there
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, use_cache=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        ids = torch.randint(0, 30, (24, 6))
    state = run(model, Prune(keep=0.3))
    module = trainable(state)
    rows = [{"input_ids": row, "labels": row, "not a column": 1} for row in ids]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=8, learning_rate=0.02,
        report_to=[], use_cpu=True, save_strategy="no", gradient_checkpointing=thrifty, disable_tqdm=True,
        gradient_checkpointing_kwargs={"use_reentrant": False} if thrifty else None,
    )  # fmt: skip
    trainer = transformers.Trainer(module, arguments, train_dataset=rows)
    trainer.train()
    after = folded(trainer.model)
    assert zeros(after) == pytest.approx(zeros(state))
    assert loss(after, ids) < 0.9 * loss(state, ids)
    trainer.save_model(str(tmp_path / "saved"))
    assert any((tmp_path / "saved").iterdir())


def loss(state: State, ids: Tensor) -> float:
    with torch.no_grad():
        return float(state.model()(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize(
    "steps", [Quantize(bits=4), Quantize(scheme="ternary"), Quantize(scheme="log")], ids=str
)
def test_a_weight_that_is_no_number_is_refused_though_codes_would_hide_it(steps: Any) -> None:
    t = tiny("mlp")
    module = trainable(run(t.model, steps))
    name, leaf = next((n, p) for n, p in module.named_parameters() if n.endswith(".w") and p.ndim > 1)
    with torch.no_grad():
        leaf.view(-1)[3] = float("nan")
    with pytest.raises(RefusedError, match="it became NaN or infinite in training"):
        folded(module)


def test_given_zeros_stay_in_a_users_loop_too() -> None:
    t = tiny("mlp")
    weight = next(p for p in t.model.parameters() if p.ndim == 2)
    with torch.no_grad():
        weight[:, ::2] = 0
    name = next(n for n, p in t.model.named_parameters() if p is weight)
    for state in (start(t.model), run(t.model, Quantize(bits=4, where=f"!{name}"))):
        after = folded(loopy(state, t))
        assert isinstance(after.forms[name], Masked)
        assert not after.state_dict()[name][:, ::2].any()
        assert after.state_dict()[name][:, 1::2].all()
        module = trainable(state, zeros="none")
        loop(module, t)
        after = folded(module)
        assert not isinstance(after.forms[name], Masked)
        assert after.state_dict()[name][:, ::2].any()
        assert not any(note.kind == "masked" for note in after.ledger.notes())
    with pytest.raises(SettingError, match="zeros=0, but it is a glob"):
        trainable(state, zeros=0)
