"""A run that is stopped after an epoch of its training, and goes on."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tersor import State, Task, run
from tersor.record import journal


def resumed(model: nn.Module, steps: Any, task: Task, folder: Path, after: int = 1) -> State:
    """What a run comes to that was stopped once `after` epochs were kept, and resumed."""
    save = journal.Training.save

    def stopping(self: Any, epoch: int, *rest: Any) -> None:
        save(self, epoch, *rest)
        if epoch == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Training, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(model, steps, task, journal=folder)
    assert list(folder.glob("training-*"))
    return run(model, steps, task, journal=folder, resume=True)
