"""quantize activations=16: pairs of 16-bit codes that runtimes read, as simulated, nearer than 8 bits."""

from pathlib import Path

import onnx
import pytest
from integer_nets import NETS, made, note
from present import EACH, present

from tersor.core.run import run
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.steps import Export, Fold, Quantize


def types_of_codes(path: Path) -> set[int]:
    """The types of the zero points of QuantizeLinear, each a constant of the file."""
    graph = onnx.load(path).graph
    types = {item.name: item.data_type for item in graph.initializer}
    return {types[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}


@pytest.mark.sampled(net=("inverted", "mlp"))
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", EACH)
def test_the_file_gives_what_is_simulated(name: str, net: str, tmp_path: Path) -> None:
    module, (model, task) = present(name), made(net)
    result = run(model, [Quantize(activations=16)], task)
    run(result, [Export(to=name, path="m.onnx")], task, out=tmp_path)
    assert types_of_codes(tmp_path / "m.onnx") == {onnx.TensorProto.UINT16}
    x = task.example[0]
    (found,) = module.open(tmp_path / "m.onnx").run(x)
    assert abs(found - result.model()(x).numpy()).max() <= 1e-4 * abs(found).max()
    assert "no kernels for 16-bit activations" in note(result).text


@pytest.mark.parametrize("net", ["residual", "columns"])
@pytest.mark.parametrize("name", EACH)
def test_a_runtime_clips_at_the_ends_of_the_grids(name: str, net: str, tmp_path: Path) -> None:
    """OpenVINO leaves pairs of 16 bits out, and would give what lies outside of the range as it is."""
    module, (model, task) = present(name), made(net)
    step = Quantize(activations=16, activation_range="percentile", activation_percentile=95)
    result = run(model, [step, Export(to=name, path="m.onnx")], task, out=tmp_path)
    x = task.example[0] * 3
    (found,), wanted = module.open(tmp_path / "m.onnx").run(x), result.model()(x).numpy()
    assert abs(found - wanted).max() <= 1e-4 * abs(wanted).max()
    free = model(x).detach().numpy()
    assert abs(free - wanted).max() > 0.05 * abs(wanted).max()


@pytest.mark.parametrize("net", NETS)
def test_what_is_lost_is_what_rounded_weights_lose(net: str) -> None:
    model, task = made(net)
    x, plain = task.example[0], {"correct": False, "smooth": False, "balance": False}
    weights = run(model, [Fold(), Quantize()], task).model()(x)
    coarse, fine = (run(model, [Quantize(activations=bits, **plain)], task) for bits in (8, 16))
    assert {grid.bits for grid in fine.grids.values()} == {16}
    assert "16-bit" not in note(coarse).text
    size = model(x).norm()
    assert (fine.model()(x) - weights).norm() < 1e-4 * size < (coarse.model()(x) - weights).norm()


def test_layers_of_8_and_of_16_bits_make_one_file(tmp_path: Path) -> None:
    """The sensitive layer alone gets 16 bits, and the result is saved, reloaded and exported."""
    model, task = made("branches")
    eight = Quantize(activations=8, where=("*", "!fc2.weight"))
    result = run(model, [eight, Quantize(activations=16, where="fc2.weight")], task)
    assert {grid.bits for grid in result.grids.values()} == {8, 16}
    save(result, tmp_path / "m.tersor")
    again = load(tmp_path / "m.tersor")
    assert again.digest == result.digest
    run(result, [Export(path="m.onnx")], task, out=tmp_path)
    assert types_of_codes(tmp_path / "m.onnx") == {onnx.TensorProto.UINT8, onnx.TensorProto.UINT16}


@pytest.mark.parametrize(
    ("net", "name", "edge", "out"),
    [("residual", "a.weight", "/relu:0", "/relu:1"),
     ("inverted", "depth.0.weight", "stem.1/hardtanh:0", "depth.0/conv2d:0")],
)  # fmt: skip
def test_a_layer_reads_the_bits_that_were_asked_for_it_in_any_order(
    net: str, name: str, edge: str, out: str
) -> None:
    """Also where other layers make or read the edge, or where the layer alone reads it by another name."""
    model, task = made(net)
    fine, rest = Quantize(activations=16, where=name), Quantize(activations=8, where=("*", f"!{name}"))
    for steps in ([rest, fine], [fine, rest], [Quantize(activations=8), fine]):
        grids = run(model, steps, task).grids
        assert grids[edge].bits == 16
        assert grids["/input:x"].bits == 8
    grids = run(model, [Quantize(activations=16), Quantize(activations=8, where=name)], task).grids
    assert grids[edge].bits == 8
    others = {grid.bits for at, grid in grids.items() if at not in (edge, out)}
    assert others == {16}
