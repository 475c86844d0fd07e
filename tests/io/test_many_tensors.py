"""Many small tensors: work grows with their number, not with its square. Calls are counted, never seconds."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tersor.core.recipe import Recipe
from tersor.errors import SiteError
from tersor.io.pack import pack
from tersor.io.patch import named_arrays
from tersor.io.patch.diff import diff
from tersor.model.sites import PartOf, Selections, Site, select
from tersor.steps import Entropy, Prune, Quantize

FEW, MANY = 40, 80


def weights(path: Path, count: int, scale: float = 1.0, names: str = "blocks.{}.w.weight") -> Path:
    drawn = torch.Generator().manual_seed(count)
    save_file({names.format(n): scale * torch.randn(8, 8, generator=drawn) for n in range(count)}, path)
    return path


def calls(work: Callable[[], Any]) -> int:
    """Calls of Python functions and of built-in ones."""
    found = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


class Seen(dict[str, Site]):
    """Sites that count how many of them are looked at by walks and copies."""

    walked = 0

    def __iter__(self) -> Iterator[str]:
        Seen.walked += len(self)
        return super().__iter__()

    def values(self) -> Any:
        Seen.walked += len(self)
        return super().values()

    def items(self) -> Any:
        Seen.walked += len(self)
        return super().items()

    def keys(self) -> Any:
        Seen.walked += len(self)
        return super().keys()


@pytest.mark.wide
@pytest.mark.parametrize(
    "steps",
    [
        (Entropy(coder="fast"),),
        (Quantize(bits=4, where="blocks.*,!blocks.3.*"), Entropy(coder="fast")),
        (Prune(keep=0.5, per="tensor"), Entropy(coder="fast", where="blocks.*")),
    ],
    ids=["lossless", "quantize", "prune"],
)
def test_twice_the_tensors_are_twice_the_work(
    steps: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {count: weights(tmp_path / f"{count}.safetensors", count) for count in (FEW, MANY)}
    module = sys.modules["tersor.io.pack"]
    plain = module.Packing.__init__

    def counting(self: Any, *given: Any) -> None:
        plain(self, *given)
        self.sites = Seen(self.sites)

    monkeypatch.setattr(module.Packing, "__init__", counting)
    walked, called = {}, {}
    for count in (FEW, FEW, MANY):  # the first fills caches
        Seen.walked = 0
        run = lambda: pack(given[count], tmp_path / "m.tersor", Recipe(steps), workers=1)  # noqa: B023, E731
        called[count] = calls(run)
        walked[count] = Seen.walked
    assert called[MANY] < 2.2 * called[FEW]
    assert walked[MANY] <= 2 * walked[FEW] + MANY  # a walk for each tensor would give four times as many


@pytest.mark.wide
def test_a_diff_walks_the_names_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Names(list[str]):
        walks = 0

        def __iter__(self) -> Iterator[str]:
            Names.walks += 1
            return super().__iter__()

    plain = named_arrays.NamedArrays.__init__

    def counting(self: Any, *given: Any, **more: Any) -> None:
        plain(self, *given, **more)
        self.names = Names(self.names)

    monkeypatch.setattr(named_arrays.NamedArrays, "__init__", counting)
    walks, called = {}, {}
    for count in (FEW, FEW, MANY):
        old = weights(tmp_path / f"old{count}.safetensors", count)
        new = weights(tmp_path / f"new{count}.safetensors", count, 1.01, "renamed.{}.weight")
        Names.walks = 0
        called[count] = calls(lambda: diff(old, new, tmp_path / "p.tersor-patch"))  # noqa: B023
        walks[count] = Names.walks
    assert walks[MANY] == walks[FEW]
    assert called[MANY] < 2.2 * called[FEW]


def test_globs_pick_from_a_part_as_from_the_whole() -> None:
    kinds = {"a.weight": "linear", "a.bias": "bias", "b.weight": "linear", "b.scale": "scale"}
    sites = {
        name: Site(name, (4, 4) if kind == "linear" else (4,), "float32", kind)
        for name, kind in kinds.items()
    }
    whole = Selections(sites)
    for where in ("*", "a.*", "*.bias", "*,!a.*", ("b.*", "*.bias"), "*.scale"):
        expected = {site.name for site in select(sites, where, "test")}
        parts = [select(PartOf({name: site}, whole), where, "test") for name, site in sites.items()]
        assert {site.name for part in parts for site in part} == expected
    with pytest.raises(SiteError, match="matches no weight"):
        select(PartOf({}, whole), "c.*", "test")
