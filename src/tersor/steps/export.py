"""Export: write the model for a runtime, run it there, and compare with PyTorch.

If edges have grids (quantize activations=8), weights are integers in the file and the runtime computes with
integers. Other weights on uniform grids are codes in the file, in blocks of inputs with a scale each. Layers
of up to 4 bits and tables run so (com.microsoft::MatMulNBits, GatherBlockQuantized); other weights are
decoded when the runtime loads the file, and so are 16-bit floats. weights=float writes float32, as large
as the given model. Outputs are those of the compressed model; a file whose outputs differ is removed.
If the task names parts of the model, each is a file. Operators that the runtime still computes in float are
listed with their times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import SettingError, few
from tersor.record.events import Group, Note
from tersor.runtimes import RUNTIMES, check_runtime, runtime
from tersor.runtimes.dynamic import axes_of
from tersor.runtimes.operators import Operator, left_integers
from tersor.settings import check_settings, check_word

WEIGHTS = ("packed", "float")
MOST = 8  # operators that are named in a note; all are in its data


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model for a runtime and check that its outputs are the same there."""

    name: ClassVar[str] = "export"
    lossless: ClassVar[bool] = True
    where: ClassVar[str] = "*"  # a file holds the whole model
    to: str = "onnxruntime"  # the runtime
    path: str = "model.onnx"  # in the folder of results
    dynamic_axes: str = ""  # further axes of any size: 1 for tokens [B, T], 2,3 for height and width
    weights: str = "packed"  # "packed": up to 8 bits stay codes, 16-bit floats stay so; "float": decoded
    dynamic_batch: bool = True  # the file takes batches of any size; else only of the example's size

    def __post_init__(self) -> None:
        check_settings(self)
        check_word(self, "to", RUNTIMES)
        check_word(self, "weights", WEIGHTS)
        check_runtime(self.to, self.name)
        axes_of(self.dynamic_axes, self.name)
        if not self.path or Path(self.path).is_absolute() or ".." in Path(self.path).parts:
            raise SettingError(
                f"export: path={self.path!r}, but it is a file name inside the folder of results"
            )

    @property
    def needs(self) -> Needs:
        return Needs.MODEL | Needs.TASK

    def run(self, view: View) -> Iterator[Group]:
        names = view.task.parts
        notes = self.file(view, self.path) if not names else []
        for name in names:  # one file each: between two parts runs what cannot be exported
            alone = replace(view, maybe_task=replace(view.task, part=name))
            path = Path(self.path)
            notes += self.file(alone, self.path if len(names) == 1 else f"{path.with_suffix('')}.{name}.onnx")
        yield Group("all", tuple(notes))

    def file(self, view: View, name: str) -> list[Note]:
        """Write the model, or the one part that the task names, to the file `name`; notes on it."""
        from tersor.model.example import example_inputs, sizes_that_vary

        writer, names = runtime(self.to), view.task.parts
        part = view.part
        model = part.deployed(self.weights)
        path = view.out / name
        inputs = example_inputs(part.task, part.plain())
        written = writer.write(
            model,
            inputs,
            path,
            dynamic_batch=self.dynamic_batch,
            dynamic_axes=axes_of(self.dynamic_axes, self.name),
        )
        differs = writer.compare(model, path, [inputs])
        data: dict[str, Any] = {
            "path": name, "nbytes": written.nbytes, "sha256": written.sha256,
            "max_abs": differs.max_abs, "agree": differs.agree,
        }  # fmt: skip
        if names:
            data["part"] = names[0]
        of = f" of the part {names[0]} alone, without the rest of the model" if names else ""
        text = f"{name}{of}, {written.nbytes} bytes, differs from PyTorch by at most {differs.max_abs:.2g}"
        if written.left_out:
            text += f"; without the outputs {', '.join(written.left_out)}, for which torch.export has no type"
        if why := written.floats:
            data |= {
                "packed": [name for name in why if not why[name]],
                "float": {name: text for name, text in why.items() if text},
            }
            text += f"; {in_words(why)}"
        if why := written.halves:
            wide = {name: text for name, text in why.items() if text}
            data |= {"halves": [name for name in why if not why[name]]}
            data |= {"float": data.get("float", {}) | wide} if wide else {}
            text += f"; {len(why) - len(wide)} of {len(why)} 16-bit weights have 16 bits there"
            text += "; in 32 bits: " + by_reason(wide) if wide else ""
        fixed = {} if names else sizes_that_vary(view.task)
        if left := [str(axis) for axis in fixed if axis not in axes_of(self.dynamic_axes, self.name)]:
            sizes = "; ".join(f"axis {axis}: {few(map(str, fixed[int(axis)]))}" for axis in left)
            text += (
                f"; it takes inputs of the example's sizes alone, and those of the task's batches vary "
                f"({sizes}): give dynamic_axes={','.join(left)}"
            )
        notes = [Note("", "written", text, data)]
        if part.state.grids:
            notes.append(operators_note(writer.operators(path, inputs)))
        return notes


def in_words(why: Mapping[str, str]) -> str:
    """How many weights stay packed in the runtime, and why others do not."""
    floats = {name: text for name, text in why.items() if text}
    text = f"{len(why) - len(floats)} of {len(why)} weights stay packed in the runtime"
    if floats:
        text += "; floats there: " + few((f"{name} ({text})" for name, text in floats.items()), MOST)
    return text


def by_reason(why: Mapping[str, str]) -> str:
    """Each reason once, with the names that it is for."""
    groups: dict[str, list[str]] = {}
    for name, text in why.items():
        groups.setdefault(text, []).append(name)
    return "; ".join(f"{few(names, MOST)} ({text})" for text, names in groups.items())


def operators_note(found: Sequence[Operator]) -> Note:
    """Which operators the runtime computes in float, and how long they take."""
    floats, whole = left_integers(found), sum(item.ms for item in found)
    ms = sum(item.ms for item in floats)
    text = f"{len(floats)} of {len(found)} operators compute in float: {ms:.3g} of {whole:.3g} ms"
    if floats:
        text += "; " + few((f"{item.name} ({item.op}, {item.ms:.2g} ms)" for item in floats), MOST)
    facts = [{"name": item.name, "op": item.op, "ms": item.ms} for item in floats]
    return Note("", "operators", text, {"float": facts, "ms": whole, "operators": len(found)}, timed=True)
