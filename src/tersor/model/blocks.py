"""Blocks: the parts of a model whose layers are rounded together.

residual   the outermost module around an addition and its branch, with 2 to MOST layers    model/branches.py
run        a module without such a block in it, with 2 to RUN layers; or neighbors in an nn.Sequential
A layer that is in none is a block of its own. Without a graph, as of a model that cannot be traced, there are
only runs. BRECQ (Li 2021) takes residual blocks because errors of layers in different ones hardly interact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import nn

from tersor.model.branches import branches
from tersor.model.graph import Graph

MOST = 8  # layers of a residual block: a transformer's has 6 or 7
RUN = 4  # layers of a run


class Block(NamedTuple):
    """One module, or neighbors in an nn.Sequential that run one after the other."""

    modules: tuple[str, ...]  # by their paths
    layers: tuple[str, ...]  # the layers in it, by their paths

    @property
    def name(self) -> str:
        first, last = self.modules[0] or "the model", self.modules[-1]
        return first if len(self.modules) == 1 else f"{first} to {last}"

    def of(self, model: nn.Module) -> nn.Module:
        """This block of a model, as one module that shares everything with it."""
        modules = [model.get_submodule(path) for path in self.modules]
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules)

    def inner(self, path: str) -> str:
        """The name in `of` of what has this name in the model."""
        for at, module in enumerate(self.modules):
            if inside(path, module):
                local = path.removeprefix(f"{module}.") if module else path
                return local if len(self.modules) == 1 else f"{at}.{local}"
        raise KeyError(path)


def blocks_of(
    model: nn.Module, graph: Graph | None, layers: Collection[str], tied: Collection[str] = ()
) -> list[Block]:
    """The blocks with 2 layers or more, among these layers. `tied`: first names of tensors with several."""
    within = {path: [at for at in layers if inside(at, path)] for path, _ in model.named_modules()}
    chosen: list[str] = []
    around = {*residual(graph, model, tied)} if graph is not None else set()
    for path, mine in within.items():  # a module comes before those in it
        fits = path in around and 2 <= len(mine) <= MOST
        if fits and not any(inside(path, other) for other in chosen):
            chosen.append(path)

    def below(path: str) -> Iterator[Block]:
        module, mine = model.get_submodule(path), within[path]
        free = not any(inside(other, path) for other in chosen)
        if path in chosen or (free and 2 <= len(mine) <= RUN):
            yield Block((path,), tuple(mine))
        elif len(mine) > 1:
            children = [f"{path}.{key}".lstrip(".") for key, _ in module.named_children()]
            plain = type(module).forward is nn.Sequential.forward
            yield from runs(children) if plain else (b for child in children for b in below(child))

    def runs(children: list[str]) -> Iterator[Block]:
        """Of an nn.Sequential: neighbors without blocks in them, as many as make RUN layers at most."""
        held: list[str] = []
        for child in children:
            single = not any(inside(other, child) for other in chosen) and len(within.get(child, ())) <= RUN
            count = sum(len(within[path]) for path in held) + len(within.get(child, ()))
            if held and (not single or count > RUN):
                yield from joined(held)
                held = []
            if single and child in within:
                held.append(child)
            else:
                yield from below(child) if child in within else ()
        yield from joined(held)

    def joined(held: list[str]) -> Iterator[Block]:
        mine = tuple(layer for path in held for layer in within[path])
        if len(mine) > 1:
            yield Block(tuple(held), mine)

    return [*below("")]


def residual(graph: Graph, model: nn.Module, tied: Collection[str]) -> Iterator[str]:
    """The innermost module around each addition of a residual branch."""
    found, left = branches(graph, model, tied)
    for branch in found:
        yield common([graph.path(branch.adds), *(graph.path(node) for node in branch.nodes)])
    for name in left:  # a shortcut with layers of its own is in the block too
        yield name.rpartition("/")[0]


def common(paths: Collection[str]) -> str:
    """The innermost module that contains all of these."""
    parts = [path.split(".") if path else [] for path in paths]
    shared = []
    for words in zip(*parts, strict=False):
        if len({*words}) > 1:
            break
        shared.append(words[0])
    return ".".join(shared)


def inside(path: str, module: str) -> bool:
    """Whether a path is that of a module, or of something in it."""
    return not module or path == module or path.startswith(f"{module}.")
