"""quantize scheme=float16 and bfloat16: rounded as the formats say, trained, coded, reloaded and exported."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from integer_nets import made
from present import EACH, present
from torch import nn

from tersor.core.history import undo
from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.loader import TensorBatches
from tersor.model.task import Task
from tersor.runtimes import onnxruntime
from tersor.runtimes.onnx_halves import narrowed
from tersor.steps import Entropy, Export, Factorize, Finetune, Fold, Prune, Quantize, Slim

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Largest error: half a step, as a share of the number; below the smallest normal number half
# the distance of two neighbors.
ROUNDOFF = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}


def weights(state: State) -> list[str]:
    return [site.name for site in state.sites.values() if site.is_weight]


def is_half(state: State, name: str, scheme: str) -> bool:
    w = state.forms[name].decode().float()
    return torch.equal(w, w.to(HALVES[scheme]).float())


@pytest.mark.parametrize("scheme", HALVES)
def test_each_number_is_off_by_at_most_half_a_step(scheme: str) -> None:
    draws = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-9, 4, 4000).reshape(40, 100)
    net = nn.Linear(100, 40)
    net.weight.data = torch.randn(40, 100, generator=draws) * sizes
    net.weight.data[0, :3] = torch.tensor([0.0, -0.0, 65_504.0])
    given = net.weight.detach().clone()
    result = run(net, [Quantize(scheme=scheme)])
    found = result.plain().weight
    relative, least = ROUNDOFF[scheme]
    assert found.dtype is torch.float32
    assert ((found - given).abs() <= given.abs() * relative + least).all()
    assert torch.equal(found, given.to(HALVES[scheme]).float())
    assert result.forms["weight"].nbytes == 2 * given.numel()


@pytest.mark.parametrize("value", [65_520.0, -1e6, 70_000.0])
def test_numbers_that_float16_lacks_are_refused_and_bfloat16_holds_them(value: float) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight.data[2, 3] = value
    with pytest.raises(RefusedError, match=r"1\.weight holds numbers above 65,504.*scheme=bfloat16"):
        run(net, [Quantize(scheme="float16")])
    assert run(net, [Quantize(scheme="bfloat16")]).plain()[1].weight.isfinite().all()
    left = run(net, [Quantize(scheme="float16", where="*,!1.weight")])
    assert left.plain()[1].weight[2, 3] == value


@pytest.mark.parametrize(("scheme", "size", "text"), [
    ("bfloat16", 3.4e38, r"above 3\.389531e\+38, which bfloat16 does not have\. Leave it out"),
    ("bfloat16", 1e300, "which bfloat16 does not have"),
    ("float16", 2.0**-26, "all would become 0. Give scheme=bfloat16"),
])  # fmt: skip
def test_a_weight_that_rounding_would_destroy_is_refused(scheme: str, size: float, text: str) -> None:
    net = nn.Linear(4, 4).double()
    net.weight.data = torch.full((4, 4), size, dtype=torch.float64)
    with pytest.raises(RefusedError, match=rf"quantize: weight holds .*{text}"):
        run(net, [Quantize(scheme=scheme)])


@pytest.mark.parametrize(("scheme", "size"), [("float16", 90_000.0), ("bfloat16", 3.4e38)])
def test_a_product_that_overflows_is_refused_though_its_factors_fit(scheme: str, size: float) -> None:
    torch.manual_seed(0)
    net = nn.Linear(64, 64)
    net.weight.data = torch.full((64, 64), size) * (1 + torch.randn(64, 64) / 1e5).clamp(max=1)
    state = run(net, Factorize(keep=0.3))
    with pytest.raises(RefusedError, match=f"weight holds numbers above .*{scheme} does not have"):
        run(state, Quantize(scheme=scheme))


def test_what_rounds_to_the_largest_number_is_stored() -> None:
    net = nn.Linear(2, 2)
    net.weight.data[0] = torch.tensor([65_519.0, -65_519.0])
    assert run(net, Quantize(scheme="float16")).plain().weight[0].tolist() == [65_504.0, -65_504.0]


def test_numbers_that_become_0_are_counted() -> None:
    net = nn.Linear(100, 2)
    net.weight.data[0, :30] = torch.logspace(-12, -9, 30)
    net.weight.data[1, :2] = 0
    (note,) = run(net, [Quantize(scheme="float16")]).ledger.notes("done")
    assert "30 numbers of 200 too small for it and now 0" in note.text
    (note,) = run(net, [Quantize(scheme="bfloat16")]).ledger.notes("done")
    assert "too small" not in note.text


@pytest.mark.parametrize("scheme", HALVES)
@pytest.mark.parametrize("kind", ["alone", "trained", "after", "pruned", "factors", "cut"])
def test_it_combines_with_other_steps_and_is_saved_and_undone(kind: str, scheme: str, tmp_path: Path) -> None:
    net, task = made("residual")
    half = Quantize(scheme=scheme)
    steps = {
        "alone": [half], "trained": [Quantize(scheme=scheme, epochs=1)], "after": [half, Finetune(epochs=1)],
        "pruned": [Prune(keep=0.4), half], "factors": [Factorize(keep=0.6), half],
        "cut": [half, Slim(keep=0.8, unmet="nearest")],
    }[kind]  # fmt: skip
    given = copy.deepcopy(net.state_dict())
    result = run(net, [*steps, Entropy()], task)
    names = weights(result) if kind != "factors" else []
    assert all(is_half(result, name, scheme) for name in names)
    if kind in ("trained", "after"):
        assert any(
            not torch.equal(result.forms[n].decode().float(), given[n].to(HALVES[scheme]).float())
            for n in names
        )
    if kind == "pruned":
        assert all((result.forms[name].decode() == 0).any() for name in names)
    save(result, tmp_path / "m.tersor")
    again = load(tmp_path / "m.tersor")
    assert again.digest == result.digest
    x = task.example[0]
    assert torch.equal(again.model(copy.deepcopy(net))(x), result.model()(x))
    if kind == "alone":
        back = undo(result).plain().state_dict()
        assert all(torch.equal(back[name], given[name]) for name in given)


@pytest.mark.parametrize("scheme", HALVES)
@pytest.mark.parametrize("name", EACH)
def test_the_file_holds_16_bits_and_gives_the_same(name: str, scheme: str, tmp_path: Path) -> None:
    module, (net, task) = present(name), wide()
    plain, half = (run(net, [Fold(), *more], task) for more in ([], [Quantize(scheme=scheme)]))
    for state, path in ((plain, "plain.onnx"), (half, "half.onnx")):
        run(state, [Export(to=name, path=path)], task, out=tmp_path)
    sizes = {path: (tmp_path / path).stat().st_size for path in ("plain.onnx", "half.onnx")}
    graph = onnx.load(tmp_path / "half.onnx").graph
    large = {item.data_type for item in graph.initializer if np.prod(item.dims) >= 1000}
    assert large <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    assert sizes["half.onnx"] < 0.55 * sizes["plain.onnx"]
    x = task.example[0]
    (found,) = module.open(tmp_path / "half.onnx").run(x)
    assert np.abs(found - half.model()(x).detach().numpy()).max() <= 1e-5 * np.abs(found).max()
    run(half, [Export(to=name, path="float.onnx", weights="float")], task, out=tmp_path)
    assert (tmp_path / "float.onnx").stat().st_size >= sizes["plain.onnx"] - 200


def test_a_weight_that_the_exporter_multiplies_by_a_norm_is_named(tmp_path: Path) -> None:
    net, task = wide()
    state = run(net, [Quantize(scheme="float16"), Export(path="m.onnx")], task, out=tmp_path)
    *_, note = state.ledger.notes("written")
    assert "put fold before quantize" in note.data["float"]["0.weight"]
    assert note.data["halves"] == ["3.weight", "5.weight"]
    text = "2 of 3 16-bit weights have 16 bits there; in 32 bits: 0.weight (a batch norm"
    assert text in note.text
    assert "packed" not in note.text
    (found,) = onnxruntime.open(tmp_path / "m.onnx").run(task.example[0])
    assert np.allclose(found, state.model()(task.example[0]).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("scheme", HALVES)
def test_norms_are_folded_into_halves_too(scheme: str) -> None:
    """The product is no 16-bit float: it is stored in float32, which a note says, until it is rounded."""
    model, task = made("residual")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    first = run(model, [Quantize(scheme=scheme)], task)
    folded = run(first, [Fold(dead=False)], task)
    x = task.example[0]
    (said,) = folded.ledger.notes("folded")
    assert said.text.startswith(f"{len(norms)} batch norms folded")
    assert torch.allclose(folded.model()(x), first.model()(x), rtol=0, atol=1e-5)
    changed = [n.text for n in folded.ledger.notes("done") if "folded" in n.text]
    assert len(changed) == len(norms)
    assert all(text.endswith("folded into it, in float32") for text in changed)
    again = run(folded, [Quantize(scheme=scheme)], task)
    assert all(is_half(again, name, scheme) for name in weights(again))
    integers = run(first, [Quantize(activations=8)], task).ledger.notes("left")
    assert not list(integers)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("kind", ["packed", "integers"])
def test_scales_of_codes_stay_constants_beside_halves(kind: str, name: str, tmp_path: Path) -> None:
    """Also where 16 bits hold all of them: OpenVINO gathers rows with constant scales alone."""
    module = present(name)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(256, 32), nn.Linear(32, 256), nn.Flatten(), nn.Linear(5 * 256, 4)).eval()
    levels = 7 if kind == "packed" else 127
    for weight in (net[0].weight.data, net[1].weight.data):
        weight.copy_(torch.randint(-levels, levels + 1, weight.shape) / 64)
        weight[:, 0] = levels / 64  # the scale of each row is 1/64
    x = torch.randint(0, 256, (16, 5))
    task = Task(calibrate=[(x, torch.zeros(16))], evaluate=[(x, torch.zeros(16))], example=(x[:2],))
    plain = {"smooth": False, "balance": False, "activations": 8} if kind == "integers" else {"bits": 4}
    steps = [Quantize(scheme="float16", where="3.weight"), Quantize(where=("*", "!3.weight"), **plain)]
    state = run(net, [*steps, Export(to=name, path="m.onnx")], task, out=tmp_path)
    (found,) = module.open(tmp_path / "m.onnx").run(x)
    wanted = state.model()(x).detach().numpy()
    assert np.abs(found - wanted).max() < 5e-3 * np.abs(wanted).max()  # integer kernels round anew
    graph = onnx.load(tmp_path / "m.onnx").graph
    made = {out for node in graph.node if node.op_type == "Cast" for out in node.output}
    assert not any(made & set(node.input[1:]) for node in graph.node if node.op_type == "DequantizeLinear")


def test_only_arrays_that_lose_nothing_are_narrowed() -> None:
    exact = np.arange(256, dtype=np.float32)
    assert narrowed(exact).dtype == np.float16  # type: ignore[union-attr]
    assert narrowed(exact * np.float32(2**100)).dtype.name == "bfloat16"  # type: ignore[union-attr]
    for other in (exact / np.float32(3), exact[:100], exact.astype(np.float64), exact + np.float32(1e-3)):
        assert narrowed(other) is None


def wide() -> tuple[nn.Module, Task]:
    """A convolution with a batch norm, and a linear layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Linear(6, 64)).eval()
    net[1].running_var.uniform_(0.5, 2)
    x = torch.randn(16, 3, 8, 8)
    net.append(nn.Flatten())
    net.append(nn.Linear(64 * 6 * 64, 4))
    loader = TensorBatches(x, net(x).argmax(1), batch=8)
    return net, Task(train=loader, evaluate=loader, calibrate=loader, example=(x[:2],))


def test_a_packed_module_names_what_it_widens() -> None:
    net, task = wide()
    state = run(net, [Quantize(scheme="float16", where="0.weight"), Quantize(bits=4, where="5.weight")], task)
    with pytest.warns(UserWarning, match=r"1 weights stay floats: 0\.weight \(it is stored in float16"):
        packed = state.model(style="packed")
    assert torch.equal(packed(task.example[0]), state.model()(task.example[0]))
