"""Latency table: sizes against torch, the file on disk with a timer that counts, and real measurements."""

import json
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tersor.errors import SettingError
from tersor.runtimes import latency_table
from tersor.runtimes.latency_table import LatencyTable, Measured, Operator, model_of, time_operators

CONV = Operator("conv", 16, 32, 1, (14, 14), (3, 3), padding=(1, 1))


class Timer:
    """Milliseconds that are known in advance, and what was asked."""

    def __init__(self, ms=lambda item: item.inputs * item.outputs / 1000, blocked=lambda item: False):
        self.ms, self.blocked, self.asked = ms, blocked, []

    def __call__(self, operators, threads):
        self.asked += operators
        return [Measured(self.ms(item), self.blocked(item), self.blocked(item)) for item in operators]


LAYERS = [
    ("conv", nn.Conv2d(6, 8, (3, 5), (2, 1), (1, 2), (2, 1), groups=2), (9, 11)),
    ("conv", nn.Conv1d(5, 7, 4, 3), (20,)),
    ("conv", nn.Conv2d(6, 6, 3, 1, 1, groups=6), (5, 5)),
    ("conv", nn.Conv3d(2, 3, 3, padding=1), (4, 5, 6)),
    ("transposed", nn.ConvTranspose2d(6, 8, 3, 2, 1, 1, groups=2), (7, 5)),
    ("transposed", nn.ConvTranspose1d(3, 4, 4, 2), (6,)),
]


def of_layer(kind, layer, spatial, batch=2):
    sizes = (spatial, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    extra = layer.output_padding if kind == "transposed" else ()
    return Operator(kind, layer.in_channels, layer.out_channels, batch, *sizes, layer.groups, extra)


@pytest.mark.parametrize(("kind", "layer", "spatial"), LAYERS, ids=[str(item[1]) for item in LAYERS])
def test_a_layer_has_the_sizes_of_torch(kind, layer, spatial):
    operator = of_layer(kind, layer, spatial)
    x = torch.zeros(2, operator.inputs, *spatial)
    y = layer(x)
    assert operator.shapes == (list(x.shape), list(y.shape))
    positions = x.shape[2:] if kind == "transposed" else y.shape[2:]
    assert operator.macs == 2 * positions.numel() * layer.weight.numel()


@pytest.mark.parametrize(("kind", "layer", "spatial"), LAYERS, ids=[str(item[1]) for item in LAYERS])
@pytest.mark.parametrize("summed", [True, False])
def test_the_timed_model_computes_the_layer(kind, layer, spatial, summed):
    """Two copies: torch with the file's weights gives what the runtime gives."""
    summed = summed and kind == "conv"
    operator = of_layer(kind, layer, spatial)
    raw = model_of(operator, 2, summed)
    weights = {
        w.name: torch.from_numpy(onnx.numpy_helper.to_array(w).copy())
        for w in onnx.load_from_string(raw).graph.initializer
    }
    x = torch.randn(operator.shapes[0])
    each = []
    for k in range(2):
        layer.load_state_dict({"weight": weights[f"w{k}"], "bias": weights[f"b{k}"]})
        each.append(layer(x).detach())
    if kind == "conv":
        first = each[0].relu()
        each = [(each[1] + first).relu()] if summed else [first, each[1].relu()]
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    for mine, theirs in zip(each, session.run(None, {"x": x.numpy()}), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-4)


@pytest.mark.parametrize("spatial", [(), (5,)])
def test_the_timed_linear_operator(spatial):
    operator = Operator("linear", 6, 4, 3, spatial)
    raw = model_of(operator, 1, False)
    w, b = (onnx.numpy_helper.to_array(each) for each in onnx.load_from_string(raw).graph.initializer)
    x = np.random.default_rng(0).standard_normal(operator.shapes[0], dtype=np.float32)
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    assert list(y.shape) == operator.shapes[1]
    np.testing.assert_allclose(y, x @ (w if spatial else w.T) + b, atol=1e-5)
    assert operator.macs == 3 * (5 if spatial else 1) * 24


def test_only_the_unknown_is_measured_and_all_is_kept(tmp_path):
    timer, seen = Timer(), []
    table = LatencyTable(folder=tmp_path, timer=timer)
    wide = Operator("linear", 100, 50)
    table.measure([CONV, wide, CONV], watch=lambda done, all: seen.append((done, all)))
    assert (len(timer.asked), seen) == (2, [(2, 2)])
    assert (table.ms(CONV), table.ms(wide)) == (0.512, 5.0)
    again = LatencyTable(folder=tmp_path, timer=timer)
    assert (again.ms(CONV), again.ms(wide)) == (0.512, 5.0)
    assert len(timer.asked) == 2
    assert again.ms(Operator("linear", 10, 10)) == 0.1
    assert len(timer.asked) == 3


def test_keys_differ_in_every_field():
    changes = {"kind": "transposed", "inputs": 17, "batch": 2, "spatial": (14, 15), "kernel": (3, 1)}
    changes |= {"stride": (2, 1), "padding": (1, 0), "dilation": (2, 1), "groups": 2, "extra": (1, 0)}
    settings = {"inputs": 16, "outputs": 32, "spatial": (14, 14), "kernel": (3, 3), "padding": (1, 1)}
    keys = {Operator(**{"kind": "conv", **settings, name: value}).key for name, value in changes.items()}
    assert len(keys | {CONV.key}) == len(changes) + 1
    assert Operator(**{"kind": "conv", **settings, "padding": (1, 1, 1, 1)}) == CONV


def test_another_process_s_measurements_are_not_lost(tmp_path):
    first, second = (LatencyTable(folder=tmp_path, timer=Timer()) for _ in range(2))
    first.ms(CONV)
    second.ms(Operator("linear", 10, 10))
    assert len(LatencyTable(folder=tmp_path, timer=Timer()).known) == 2


def test_each_number_of_threads_has_its_own_file(tmp_path):
    LatencyTable(folder=tmp_path, timer=Timer()).ms(CONV)
    assert LatencyTable(threads=2, folder=tmp_path, timer=Timer()).known == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace(onnxruntime.__version__, "0.1"),
        lambda text: text.replace("0.512", '"fast"'),
        lambda text: text.replace("0.512", "null"),
        lambda text: text.replace("0.512", "NaN"),
        lambda text: text.replace("0.512", "-1.0"),
        lambda text: text.replace("operators", "operas"),
        lambda text: text.replace("0.512", "[]"),
    ],
)
def test_a_damaged_file_is_ignored_and_written_anew(tmp_path, damage):
    table = LatencyTable(folder=tmp_path, timer=Timer())
    table.ms(CONV)
    good = table.path.read_text()
    bad = damage(good)
    assert bad != good
    table.path.write_text(bad)
    timer = Timer()
    assert LatencyTable(folder=tmp_path, timer=timer).ms(CONV) == 0.512
    assert len(timer.asked) == 1
    assert table.path.read_text() == good


def test_bytes_that_are_no_text_are_ignored(tmp_path):
    table = LatencyTable(folder=tmp_path, timer=Timer())
    table.path.write_bytes(b"\xff\xfe{}")
    assert LatencyTable(folder=tmp_path, timer=Timer()).known == {}


def test_without_a_folder_the_table_lives_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    timer = Timer()
    table = LatencyTable(folder=tmp_path / "file" / "below", timer=timer)
    assert table.path is None
    assert (table.ms(CONV), table.ms(CONV), len(timer.asked)) == (0.512, 0.512, 1)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX")
def test_a_disk_that_refuses_later_is_no_error(tmp_path):
    table = LatencyTable(folder=tmp_path / "a", timer=Timer())
    (tmp_path / "a").rmdir()
    (tmp_path / "a").write_text("")
    assert table.ms(CONV) == 0.512


def test_the_first_cache_folder_that_can_be_written_is_taken(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        latency_table, "bases", lambda: iter([(tmp_path / "file", False), (tmp_path / "b", False)])
    )
    table = LatencyTable(timer=Timer())
    table.ms(CONV)
    assert table.path.parent == tmp_path / "b" / "latency"
    assert json.loads(table.path.read_text())["threads"] == 1


def test_between_multiples_the_time_is_linear_in_each_width(tmp_path):
    timer = Timer(ms=lambda item: item.inputs * item.outputs + 3.0 * item.inputs + 1)
    table = LatencyTable(folder=tmp_path, timer=timer)
    for i, o in [(16, 32), (20, 40), (5, 17), (1, 16)]:
        # Exact here: the time is linear in each width.
        assert table.between(Operator("linear", i, o)) == pytest.approx(i * o + 3 * i + 1)
    assert {(x.inputs % 16, x.outputs % 16) for x in timer.asked} <= {(0, 0), (1, 0)}
    exact = Operator("linear", 21, 41)
    table.timer = Timer(ms=lambda item: 7.0)
    table.ms(exact)
    assert table.between(exact) == 7.0


def test_a_tensor_is_converted_once_where_layouts_differ(tmp_path):
    """Widths of 16 are blocked: 16 > 16 > 8 > 8, the first read by two plain operators."""
    timer = Timer(
        ms=lambda item: 100.0 if item.kind == "reorder" else 1.0,
        blocked=lambda item: item.inputs == 16,
    )
    table = LatencyTable(folder=tmp_path, timer=timer)
    wide, plain = Operator("linear", 16, 8), Operator("linear", 8, 8)
    assert table.total([wide, plain, plain]) == 3.0
    assert table.total([wide, plain, plain], [(0, 1), (0, 2)]) == 103.0
    assert table.total([wide, wide, plain], [(0, 1), (1, 2)]) == 103.0
    assert table.total([plain, plain, plain], [(0, 1), (1, 2)]) == 3.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("convolution", 1, 1), "did you mean \"?'?conv"),
        (("conv", 1, 1), "one number for each axis"),
        (("conv", 1, 1, 1, (8, 8), (3,)), "one number for each axis"),
        (("conv", 1, 1, 1, (8, 8), (3, 3), (1,)), "one number for each axis"),
        (("conv", 1, 1, 1, (8, 8), (3, 3), (1, 1), (1, 1, 1)), "one number for each axis"),
        (("linear", 1, 1, 1, (), (3,)), "one number for each axis"),
        (("linear", 0, 1), "1 or more"),
        (("conv", 1, 1, 1, (2, 2), (3, 3)), r"those of the output \(0, 0\)"),
        (("conv", 6, 9, 1, (8,), (3,), (1,), (0,), (1,), 6), "groups divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(SettingError, match=says):
        Operator(*settings)


def test_settings_that_are_not_allowed_are_refused(tmp_path):
    with pytest.raises(SettingError, match="runtime 'onnxruntim'; did you mean"):
        LatencyTable("onnxruntim", folder=tmp_path)
    with pytest.raises(SettingError, match="threads=0"):
        LatencyTable(threads=0, folder=tmp_path)
    with pytest.raises(SettingError, match="step=0"):
        LatencyTable(folder=tmp_path, timer=Timer()).between(CONV, 0)


@pytest.mark.wide
def test_more_work_takes_longer():
    """Factors of 64 in work, for every kind."""
    small, large = Operator("linear", 32, 32, 4), Operator("linear", 256, 256, 4)
    tokens, more = Operator("linear", 32, 32, 1, (16,)), Operator("linear", 256, 256, 1, (16,))
    conv = [Operator("conv", n, n, 1, (16, 16), (3, 3), padding=(1, 1)) for n in (16, 128)]
    back = [Operator("transposed", n, n, 1, (8, 8), (2, 2), (2, 2)) for n in (8, 64)]
    deep = [Operator("conv", n, n, 1, (16, 16), (3, 3), padding=(1, 1), groups=n) for n in (16, 1024)]
    line = [Operator("conv", n, n, 1, (64,), (3,)) for n in (8, 64)]
    each = [(small, large), (tokens, more), conv, back, deep, line]
    found = time_operators([item for pair in each for item in pair], 1)
    for (first, _), short, long in zip(each, found[::2], found[1::2], strict=True):
        assert 4 * short.ms < long.ms, first.key


def test_layouts_are_those_of_the_runtime():
    """The blocked layout is of 2-d convolutions. With few inputs they read the plain one."""
    image = Operator("conv", 3, 32, 1, (8, 8), (3, 3))
    wide = Operator("conv", 32, 32, 1, (8, 8), (3, 3))
    line = Operator("conv", 32, 32, 1, (8,), (3,))
    found = [latency_table.layouts(item) for item in (image, wide, line, Operator("linear", 32, 32))]
    assert [item[1] for item in found] == [False, found[1][2], False, False]
    assert [item[2] for item in found] == [found[1][2], found[1][2], False, False]
    assert found[1][0]


def test_one_reorder_is_measured():
    (found,) = time_operators([Operator("reorder", 32, 32, 8, (14, 14))], 1)
    assert 1e-4 < found.ms < 10
