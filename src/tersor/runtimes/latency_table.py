"""Latency table: measured milliseconds of one operator at given widths, in ONNX Runtime on the CPU.

ms = (burst of 1 + N copies - burst of 1 copy) / N      each the lower quartile over rounds, in turn

The difference removes the call (5 to 10 us) and the conversion of inputs and outputs. The copies read one
input and have weights of their own. Convolutions are summed, y[k] = relu(conv[k](x) + y[k - 1]), because the
runtime fuses that sum and then keeps its blocked layout (NCHWc) from one to the next, as in a network. Where
it does not, each copy writes an output of its own. Rounds are added while the quartile is unsure.
Layouts are read from the graph that the runtime made of two copies; `total` adds the conversions of tensors.
Left out is what is around the operators, some 25 us in a ResNet-20. Weights are as warm as in a net of 1 MB:
where they come from memory, as in large linear layers at batch 1, a net takes longer.
On disk   JSON in a cache folder, one file for each runtime, version, processor and number of threads
Cost      80 ms an operator of up to 1 ms, once a machine; several times that beside other load
"""

from __future__ import annotations

import json
import math
import platform
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tersor.compiled import bases, usable
from tersor.errors import SettingError, StorageError, did_you_mean
from tersor.files import write_text
from tersor.measure.latency import interleave

FORMAT, ORT = 1, "onnxruntime"
KINDS = ("conv", "transposed", "linear", "reorder")
BLOCKED, BLOCK = "com.microsoft.nchwc", 16  # domain of operators in that layout; most channels a block
TOGETHER = 6  # operators timed in turn
ROUNDS, BURST_MS, WARMUP_MS = 12, 2.0, 8.0
TRIES, AGREE = 4, 0.05  # times ROUNDS, while minimum and quartile differ by more than this part of the result
MOST, HOT = 32, 1 << 18  # copies, and their weights together, about: 1 MB
WORK = 8e6  # multiply-accumulates of all copies together, about: some 100 us
FLOOR_MS = 1e-5  # of an operator that is faster than the difference can tell


@dataclass(frozen=True)
class Operator:
    """One operator and its sizes, with a number for each axis of `spatial`; () is the default.

    A linear operator has spatial () for inputs [B, I], (T,) for [B, T, I]. A reorder converts a blocked
    tensor [B, O, *spatial] to the plain layout.
    """

    kind: str  # one of KINDS; a depthwise convolution has groups = inputs
    inputs: int  # channels or columns
    outputs: int
    batch: int = 1
    spatial: tuple[int, ...] = ()  # of the input, for example (height, width)
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()  # for each axis, or for all begins and then all ends
    dilation: tuple[int, ...] = ()
    groups: int = 1
    extra: tuple[int, ...] = ()  # output padding of a transposed convolution

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"latency table: kind {self.kind!r}; {did_you_mean(self.kind, KINDS)}")
        axes = len(self.spatial) if self.kind in ("conv", "transposed") else 0
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("extra", 0)):
            object.__setattr__(self, name, tuple(getattr(self, name)) or (default,) * axes)
        if len(self.padding) == axes:
            object.__setattr__(self, "padding", self.padding * 2)
        each = set(map(len, (self.kernel, self.stride, self.dilation, self.extra, self.padding[axes:])))
        if each != {axes} or (axes == 0 and self.kind in ("conv", "transposed")):
            raise SettingError(f"latency table: {self.key}: it needs one number for each axis of space")
        sizes = (self.inputs, self.outputs, self.batch, self.groups, *self.spatial, *self.kernel, *self.space)
        if min(sizes) < 1 or self.inputs % self.groups or self.outputs % self.groups:
            raise SettingError(
                f"latency table: {self.key}: all sizes are 1 or more, those of the output {self.space} too; "
                "groups divide inputs and outputs"
            )

    @property
    def key(self) -> str:
        """A text that names the operator, the same on every machine: all fields in order."""
        return " ".join(str(item).replace(" ", "") for item in astuple(self))

    @property
    def space(self) -> tuple[int, ...]:
        """The spatial sizes of the output."""
        found, axes = [], len(self.kernel)
        for at in range(axes):
            size, step, pad = self.spatial[at], self.stride[at], self.padding[at] + self.padding[at + axes]
            reach = self.dilation[at] * (self.kernel[at] - 1) + 1
            grown = (size - 1) * step - pad + reach + self.extra[at]
            found.append((size + pad - reach) // step + 1 if self.kind == "conv" else grown)
        return tuple(found) if axes else self.spatial

    @property
    def shapes(self) -> tuple[list[int], list[int]]:
        """The shapes of the input and the output."""
        if self.kind == "linear":
            return [self.batch, *self.spatial, self.inputs], [self.batch, *self.spatial, self.outputs]
        i = -(-self.inputs // BLOCK) * BLOCK if self.kind == "reorder" else self.inputs
        return [self.batch, i, *self.spatial], [self.batch, self.outputs, *self.space]

    @property
    def macs(self) -> int:
        """Multiply-accumulates; of a reorder, elements."""
        space = self.spatial if self.kind == "transposed" else self.space
        return self.batch * math.prod(space) * self.weights

    @property
    def weights(self) -> int:
        each = self.inputs // self.groups * math.prod(self.kernel)
        return self.outputs * (1 if self.kind == "reorder" else each)


class Measured(NamedTuple):
    """Time and layouts of one operator."""

    ms: float
    reads_blocked: bool
    writes_blocked: bool


Folder = str | Path | None
Timer = Callable[[Sequence[Operator], int], list[Measured]]


class LatencyTable:
    """Milliseconds of operators on this machine. What is not known is measured when asked for, and kept.

    `folder`: where the file is kept; None takes the first cache folder that can be written. Where there is
    none, the table lives as long as the process. `timer(operators, threads)` replaces the measurement.
    """

    def __init__(
        self, runtime: str = ORT, threads: int = 1, *, folder: Folder = None, timer: Timer | None = None
    ) -> None:
        if runtime != ORT:
            raise SettingError(f"latency table: runtime {runtime!r}; {did_you_mean(runtime, [ORT])}")
        if not isinstance(threads, int) or threads < 1:
            raise SettingError(f"latency table: threads={threads!r}, but it is a number, 1 or more")
        import onnxruntime

        self.threads, self.timer = threads, timer or time_operators
        self.about = {"runtime": f"{runtime} {onnxruntime.__version__}", "cpu": cpu(), "threads": threads}
        self.path = place(folder, json.dumps(self.about))
        self.known: dict[str, Measured] = self._read()

    def ms(self, operator: Operator) -> float:
        """The operator's time at exactly these widths. Measured if it is not known."""
        self.measure([operator])
        return self.known[operator.key].ms

    def measure(self, operators: Iterable[Operator], watch: Callable[[int, int], None] | None = None) -> None:
        """Measure those that are not known, and save. `watch(done, all)` is called between groups."""
        new = list({item.key: item for item in operators if item.key not in self.known}.values())
        # Operators of like cost together: during long bursts the others' data leaves the caches.
        new.sort(key=lambda item: (item.macs, item.key))
        for begin in range(0, len(new), TOGETHER):
            group = new[begin : begin + TOGETHER]
            found = self.timer(group, self.threads)
            self.known |= {item.key: each for item, each in zip(group, found, strict=True)}
            if watch is not None:
                watch(begin + len(group), len(new))
        if new:
            self._save()

    def between(self, operator: Operator, step: int = 16) -> float:
        """The operator's time if it is known, has groups or widths that are multiples of `step`. Otherwise
        linear between the multiples around, which misses narrower steps: measure the final widths exactly."""
        if step < 1:
            raise SettingError(f"latency table: step={step}, but it is a number of channels, 1 or more")
        if operator.key in self.known or operator.groups > 1:
            return self.ms(operator)
        corners = [
            (a * b, replace(operator, inputs=i, outputs=o))
            for i, a in around(operator.inputs, step)
            for o, b in around(operator.outputs, step)
        ]
        self.measure(item for _, item in corners)
        return sum(weight * self.ms(item) for weight, item in corners)

    def total(self, operators: Sequence[Operator], edges: Iterable[tuple[int, int]] = ()) -> float:
        """The sum, with the conversions of layouts. An edge (from, to) says that operator `to` reads what
        operator `from` wrote, directly or through elementwise operators. A tensor is converted once, however
        many readers it has."""
        self.measure(operators)
        found = [self.known[item.key] for item in operators]
        tensors = {a for a, b in edges if found[a].writes_blocked != found[b].reads_blocked}
        written = [operators[a] for a in sorted(tensors)]
        reorders = [Operator("reorder", w.outputs, w.outputs, w.batch, w.space) for w in written]
        self.measure(reorders)
        return sum(self.ms(item) for item in (*operators, *reorders))

    def _read(self) -> dict[str, Measured]:
        """What the file holds. A file that is damaged or of something else holds nothing."""
        try:
            found = json.loads(self.path.read_text()) if self.path else {}
            same = found["format"] == FORMAT and all(found[name] == self.about[name] for name in self.about)
            items = found["operators"].items() if same else ()
            return {key: Measured(ms, *map(bool, two)) for key, (ms, *two) in items if 0 < ms < math.inf}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}

    def _save(self) -> None:
        """Write the file, with what other processes wrote meanwhile. If the disk refuses, nothing is kept."""
        if self.path is not None:
            self.known = self._read() | self.known
            operators = {key: list(item) for key, item in sorted(self.known.items())}
            text = json.dumps({"format": FORMAT, **self.about, "operators": operators}, indent=0)
            with suppress(StorageError, SettingError):
                write_text(self.path, text)


def around(width: int, step: int) -> list[tuple[int, float]]:
    """The measured widths around one, with weights. Below the first multiple, the width 1 is measured."""
    low, high = max(1, width // step * step), -(-width // step) * step
    part = (width - low) / max(high - low, 1)
    return [(low, 1 - part), (high, part)] if part else [(width, 1.0)]


def place(folder: Folder, about: str) -> Path | None:
    """The table's file, or None where nothing can be written."""
    tried = ((base / "latency", own) for base, own in bases()) if folder is None else [(Path(folder), False)]
    name = f"latency-{zlib.crc32(about.encode()):08x}.json"
    return next((path / name for path, private in tried if usable(path, private)), None)


def cpu() -> str:
    """The processor's model, and a hash of its features: virtual machines give many models one name."""
    path = Path("/proc/cpuinfo")
    text = path.read_text().split("\n\n")[0] if path.exists() else ""
    facts = dict(re.findall(r"^([^\t:]+)\t*: ?(.*)$", text, re.M))
    exact = " ".join(facts.get(name, "") for name in ("cpu family", "model", "stepping", "flags", "Features"))
    name = facts.get("model name", platform.processor())
    return f"{platform.machine()} {name} {zlib.crc32(exact.encode()):08x}"


def model_of(operator: Operator, copies: int, summed: bool) -> bytes:
    """An ONNX file in memory: copies of the operator that read one input x, with random weights. `summed`:
    each adds the previous one's output; otherwise each has its own."""
    from onnx import TensorProto, helper, numpy_helper

    random, weights, nodes = np.random.default_rng(0), [], []

    def weight(name: str, *shape: int) -> str:
        value = random.standard_normal(shape, dtype=np.float32) / math.sqrt(math.prod(shape[1:]))
        weights.append(numpy_helper.from_array(value, name))
        return name

    def node(kind: str, inputs: list[str], output: str, **settings: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], **settings))

    i, o, g, kernel = operator.inputs, operator.outputs, operator.groups, operator.kernel
    sizes: dict[str, Any] = {"kernel_shape": kernel, "strides": operator.stride, "pads": operator.padding}
    sizes |= {"dilations": operator.dilation, "group": g}
    for k in range(copies):
        y, w, b, c, before = f"y{k}", f"w{k}", f"b{k}", f"c{k}", f"y{k - 1}"
        if operator.kind == "reorder":
            node("ReorderOutput", ["x"], y, domain=BLOCKED, channels=o)
        elif operator.kind == "transposed":
            weight(w, i, o // g, *kernel)
            node("ConvTranspose", ["x", w, weight(b, o)], y, **sizes, output_padding=operator.extra)
        elif operator.kind == "conv":
            node("Conv", ["x", weight(w, o, i // g, *kernel), weight(b, o)], c, **sizes)
            if summed and k:
                node("Add", [c, before], c := f"a{k}")
            node("Relu", [c], y)
        elif operator.spatial:
            node("MatMul", ["x", weight(w, i, o)], c)
            node("Add", [c, weight(b, o)], y)
        else:
            node("Gemm", ["x", weight(w, o, i), weight(b, o)], y, transB=1)
    last = range(copies - 1 if summed else 0, copies)
    ins, outs = ((TensorProto.FLOAT, shape) for shape in operator.shapes)
    outputs = [helper.make_tensor_value_info(f"y{k}", *outs) for k in last]
    graph = helper.make_graph(nodes, "copies", [helper.make_tensor_value_info("x", *ins)], outputs, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(BLOCKED, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def session_of(operator: Operator, copies: int, summed: bool, threads: int, optimized: str = "") -> Any:
    """A session; `optimized` names a file for the graph that the runtime makes."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # or they spin on the next one's cores
    if optimized:
        options.optimized_model_filepath = optimized
    if operator.kind == "reorder":  # the optimizer would merge its copies
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(
        model_of(operator, copies, summed), options, providers=["CPUExecutionProvider"]
    )


def layouts(operator: Operator) -> tuple[bool, bool, bool]:
    """Whether the runtime fuses the sum of copies, and whether it reads and writes the blocked layout."""
    import onnx

    if operator.kind != "conv":
        return False, operator.kind == "reorder", False
    with tempfile.TemporaryDirectory() as folder:
        session_of(operator, 2, True, 1, f"{folder}/optimized.onnx")
        kinds = {(item.domain, item.op_type) for item in onnx.load(f"{folder}/optimized.onnx").graph.node}
    return ("", "Add") not in kinds, (BLOCKED, "ReorderInput") in kinds, (BLOCKED, "Conv") in kinds


def runner(operator: Operator, copies: int, summed: bool, threads: int) -> Callable[[], object]:
    """A call of a model of copies. Inputs and outputs are bound once, so that no memory is allocated."""
    from onnxruntime import OrtValue

    session, (x, y) = session_of(operator, copies, summed, threads), operator.shapes
    values, binding = np.random.default_rng(1).standard_normal(x, dtype=np.float32), session.io_binding()
    binding.bind_ortvalue_input("x", OrtValue.ortvalue_from_numpy(values))
    for item in session.get_outputs():
        binding.bind_ortvalue_output(item.name, OrtValue.ortvalue_from_shape_and_type(y, np.float32))
    return lambda: session.run_with_iobinding(binding)


def time_operators(operators: Sequence[Operator], threads: int) -> list[Measured]:
    """Time some operators in turn."""
    facts = [layouts(item) for item in operators]
    copies = [min(MOST, 1 + int(min(WORK / item.macs, HOT / item.weights))) for item in operators]
    runs: dict[str, Callable[[], object]] = {}
    for at, (item, (summed, _, _)) in enumerate(zip(operators, facts, strict=True)):
        runs[f"one {at}"] = runner(item, 1, summed, threads)
        runs[f"all {at}"] = runner(item, 1 + copies[at], summed, threads)
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    unsure = set(range(len(operators)))
    for _ in range(TRIES):
        again = {name: run for name, run in runs.items() if int(name.split()[1]) in unsure}
        for name, timing in (interleave(again, ROUNDS, BURST_MS, WARMUP_MS) if again else {}).items():
            rounds[name] = sorted([*rounds[name], *timing.rounds])
        low = {name: times[len(times) // 4] for name, times in rounds.items()}
        ms = [low[f"all {at}"] - low[f"one {at}"] for at in range(len(operators))]
        gaps = {name: low[name] - times[0] for name, times in rounds.items()}
        unsure = {at for at in unsure if gaps[f"all {at}"] + gaps[f"one {at}"] > AGREE * ms[at]}
    ms = [max(time / count, FLOOR_MS) for time, count in zip(ms, copies, strict=True)]
    return [Measured(time, *fact[1:]) for time, fact in zip(ms, facts, strict=True)]
