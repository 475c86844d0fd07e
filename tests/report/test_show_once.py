"""Show decodes each stream once, and says what each leaf of a form alone says."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersor import Cluster, Entropy, Prune, Quantize, coders, run, save
from tersor.coders import arrays
from tersor.described import described
from tersor.io.container import load
from tersor.report.show import shown


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 30))
    steps = [Prune(keep=0.4), Cluster(entries=8, where="0.weight"), Quantize(where="2.weight"), Entropy()]
    save(run(net, steps), tmp_path / "m.tersor")
    return tmp_path / "m.tersor"


def test_each_stream_is_decoded_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: Counter[bytes] = Counter()

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(data: Any, *args: Any, **named: Any) -> Any:
            decoded[bytes(data)] += 1
            return call(data, *args, **named)

        return counted

    for module, name in ((coders, "decode"), (arrays, "decode"), (arrays, "decode_parts")):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    described(file)
    assert decoded
    assert set(decoded.values()) == {1}


@pytest.mark.parametrize("glob", [None, "2.*"])
def test_the_facts_are_those_of_the_state(file: Path, glob: str | None) -> None:
    assert described(file, glob)[0] == shown(load(file), file, glob)
