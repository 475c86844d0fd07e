"""As module: a runtime's session as an nn.Module, so that a task feeds and scores it as any model.

forward(*args, **kwargs) -> tensor, or Outputs: a named tuple, output[0], output.logits, output["logits"]
What a file does not keep: the classes and the nesting of the model's output. One tensor comes as a tensor,
several come as one flat tuple. It has no parameters and runs on the CPU.
"""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import SettingError, TaskError, did_you_mean
from tersor.runtimes.agree import tensors
from tersor.runtimes.output_names import tensors_by_path


class Session(Protocol):
    """What `open` of a runtime returns."""

    inputs: list[str]
    outputs: list[str]
    batch: int | None  # the only batch that it takes; None for any

    def run(self, *arrays: np.ndarray | Tensor, **named: np.ndarray | Tensor) -> list[np.ndarray]: ...


class Outputs(tuple[Tensor, ...]):
    """Several outputs, in the file's order. They are also found by their names, as keys or attributes."""

    names: tuple[str, ...]

    def __new__(cls, values: Sequence[Tensor], names: Sequence[str]) -> Outputs:
        made = super().__new__(cls, values)
        made.names = tuple(names)
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.names

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key not in self.names:
            raise KeyError(f"no output {key!r}; {did_you_mean(key, self.names)}")
        return super().__getitem__(self.names.index(key))

    def __getattr__(self, name: str) -> Tensor:
        # Names such as "count" are methods of a tuple: output["count"].
        if name in self.__dict__.get("names", ()) and not keyword.iskeyword(name):
            found: Tensor = self[name]
            return found
        raise AttributeError(f"no output {name!r}; {did_you_mean(name, self.__dict__.get('names', ()))}")


class SessionModule(nn.Module):
    """A session as a module. `name`: of the file, for messages."""

    def __init__(self, session: Session, name: str):
        super().__init__()
        self.session, self.name = session, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors go in as given, in order or by name; other values were constants of the export and are left
        out. A file with a fixed batch gets its samples in parts of that size. TaskError if they do not fit
        the file, or if an output is no tensor of numbers."""
        named = dict(tensors_by_path(kwargs))
        try:
            found = self.in_parts(tensors(args), named)
        except SettingError as error:
            raise TaskError(
                f"{str(error).rstrip('.')}. A file takes the inputs that it was exported with: export it "
                "with a dynamic batch, with dynamic_axes where other sizes vary (1 for tokens), or give a "
                "task whose batches have its inputs and sizes (for an encoder-decoder also decoder_input_ids)"
            ) from error
        outputs = [self._tensor(*item) for item in zip(self.session.outputs, found, strict=True)]
        return outputs[0] if len(outputs) == 1 else Outputs(outputs, self.session.outputs)

    def in_parts(self, given: list[Tensor], named: dict[str, Tensor]) -> list[np.ndarray]:
        """The outputs of all samples: in one call, or in calls of the file's fixed batch. The last part is
        filled up with its last sample, whose outputs are left out."""
        first = given[0] if given else named.get(self.session.inputs[0])
        size, count = self.session.batch, len(first) if first is not None and first.ndim else 0
        if not size or not count or count == size:
            return self.session.run(*given, **named)

        def part(item: Tensor) -> Tensor:
            if not item.ndim or len(item) != count:
                return item
            rows = item[begin : begin + size]
            return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])

        parts = []
        for begin in range(0, count, size):
            some = self.session.run(*map(part, given), **{key: part(item) for key, item in named.items()})
            if alone := [
                n for n, out in zip(self.session.outputs, some, strict=True) if out.shape[:1] != (size,)
            ]:
                raise TaskError(
                    f"{self.name}: it takes batches of {size} alone, and its output {alone[0]!r} is not one "
                    f"item a sample, so batches of {count} cannot be split. Give the task batches of {size}"
                )
            parts.append([out[: count - begin] for out in some])
        return [np.concatenate(outs) for outs in zip(*parts, strict=True)]

    def _tensor(self, name: str, value: Any) -> Tensor:
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
            kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise TaskError(
                f"{self.name}: its output {name!r} is {kind}, and a metric takes tensors of numbers. Export "
                "the model without it"
            )
        tensor = torch.from_numpy(value)
        # Scoring makes 16 bits float32 too, but would return a plain tuple.
        return tensor.float() if tensor.dtype is torch.float16 else tensor
