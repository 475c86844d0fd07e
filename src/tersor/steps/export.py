"""Export: write the model for a runtime, run it there, and compare with PyTorch.

If edges have grids (quantize activations=8), weights are integers in the file and the runtime computes with
integers. Otherwise weights are decoded to floats, and the file is as large as the given model's. Outputs are
those of the compressed model; a file whose outputs differ is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import SettingError
from tersor.record.events import Group, Note
from tersor.runtimes import RUNTIMES, check_runtime, runtime
from tersor.settings import check_settings, check_word


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model for a runtime and check that its outputs are the same there."""

    name: ClassVar[str] = "export"
    lossless: ClassVar[bool] = True
    where: ClassVar[str] = "*"  # a file holds the whole model
    to: str = "onnxruntime"  # the runtime
    path: str = "model.onnx"  # in the folder of results
    dynamic_batch: bool = True  # the file takes batches of any size; else only of the example's size

    def __post_init__(self) -> None:
        check_settings(self)
        check_word(self, "to", RUNTIMES)
        check_runtime(self.to, self.name)
        if not self.path or Path(self.path).is_absolute() or ".." in Path(self.path).parts:
            raise SettingError(
                f"export: path={self.path!r}, but it is a file name inside the folder of results"
            )

    @property
    def needs(self) -> Needs:
        return Needs.MODEL | Needs.TASK

    def run(self, view: View) -> Iterator[Group]:
        from tersor.model.example import example_inputs

        writer = runtime(self.to)
        model = view.deployed()
        path = view.out / self.path
        inputs = example_inputs(view.task, model)
        written = writer.write(model, inputs, path, dynamic_batch=self.dynamic_batch)
        differs = writer.compare(model, path, [inputs])
        data = {
            "path": self.path, "nbytes": written.nbytes, "sha256": written.sha256,
            "max_abs": differs.max_abs, "agree": differs.agree,
        }  # fmt: skip
        text = f"{self.path}, {written.nbytes} bytes, differs from PyTorch by at most {differs.max_abs:.2g}"
        if written.left_out:
            text += f"; without the outputs {', '.join(written.left_out)}, for which torch.export has no type"
        yield Group("all", (Note("", "written", text, data),))
