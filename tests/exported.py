"""A second, slow way to name edges and to round them, on the graph that torch.export makes of a model.

Nothing here is shared with src/tersor but the table of operators' names. Names come from the nodes' module
stacks, rounding from numpy; each named node is followed by a call of the rounding function.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.forms.grid import Grid
from tersor.model.ops import OPS


def named_nodes(program: torch.export.ExportedProgram, model: nn.Module) -> list[tuple[str, Any, int | None]]:
    """(edge name, node, which of its outputs or None where it has one) in the graph's order."""
    first = {id(module): path for path, module in model.named_modules()}
    counts: dict[Any, dict[str, int]] = {}
    found = []
    for node in program.graph.nodes:
        words = str(node.target).split(".")
        op = OPS.get(words[1]) if node.op == "call_function" and words[0] == "aten" else None
        several = isinstance(node.meta.get("val"), (tuple, list))
        values = list(node.meta["val"]) if several else [node.meta.get("val")]
        floating = [isinstance(value, Tensor) and value.is_floating_point() for value in values]
        if op is None or not any(floating):
            continue
        stack = node.meta.get("nn_module_stack", {})
        mine = counts.setdefault(tuple((key, path) for key, (path, _) in stack.items()), {})
        mine[op] = mine.get(op, -1) + 1
        path = [path for path, _ in stack.values()][-1].split("@")[0]
        name = f"{first[id(model.get_submodule(path))]}/{op}:{mine[op]}"
        found += [
            (f"{name}.{j}" if several else name, node, j if several else None)
            for j, is_floating in enumerate(floating)
            if is_floating
        ]
    return found


def slow_grid(x: Tensor, grid: Grid) -> Tensor:
    """Grid of an edge in numpy, float32, one channel after another."""
    values = x.detach().numpy().astype(np.float32)
    scales = grid.scale.decode().numpy()
    zeros = np.zeros(scales.shape, np.float32) if grid.zero is None else grid.zero.decode().float().numpy()
    rows = values.reshape(1, -1) if len(scales) == 1 else np.moveaxis(values, grid.axis, 0)
    low = -(2 ** (grid.bits - 1)) if grid.signed else 0
    high = low + 2**grid.bits - 1
    out = np.empty_like(rows)
    for c, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        codes = np.clip(np.rint(rows[c] / scale) + zero, low, high)
        out[c] = (codes - zero) * scale
    out = out.reshape(values.shape) if len(scales) == 1 else np.moveaxis(out, 0, grid.axis)
    return torch.from_numpy(np.ascontiguousarray(out)).to(x.dtype)


class Lsq(torch.autograd.Function):
    """The slow grid with the gradients of Esser 2020, equations 1, 3 and 5, summed in double precision. Which
    code an element has is decided in float32, or near ties it would be another one than forward's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, slow: "Slow") -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.slow = slow
        return slow_grid(x, slow.grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, scale = (value.detach().double().numpy() for value in ctx.saved_tensors)
        grid = ctx.slow.grid
        low = -(2 ** (grid.bits - 1)) if grid.signed else 0
        high = low + 2**grid.bits - 1
        zero = np.zeros(len(scale)) if grid.zero is None else grid.zero.decode().double().numpy()
        shape = [-1 if len(scale) > 1 and at == grid.axis else 1 for at in range(x.ndim)]
        s, z = scale.reshape(shape), zero.reshape(shape)
        pulls = grad.double().numpy()
        exact = (x.astype(np.float32) / s.astype(np.float32)).astype(float)
        inside = (exact + z >= low) & (exact + z <= high)
        slope = np.where(inside, np.rint(exact) - exact, np.where(exact + z < low, low, high) - z)
        ease = (int(np.prod(x.shape[1:])) // len(scale) * high) ** -0.5
        axes = tuple(at for at in range(x.ndim) if len(scale) == 1 or at != grid.axis)
        moved = (pulls * slope).sum(axes).reshape(-1) * ease
        ctx.slow.size += float(np.abs(pulls * slope).sum()) * ease
        return torch.from_numpy(pulls * inside).to(grad.dtype), torch.from_numpy(moved).float(), None


class Slow(nn.Module):
    def __init__(self, grid: Grid):
        super().__init__()
        self.grid, self.scale = grid, nn.Parameter(grid.scale.decode().clone())
        self.size = 0.0  # how large the terms are that the scale's gradient is the sum of

    def forward(self, x: Tensor) -> Tensor:
        return Lsq.apply(x, self.scale, self)


def inserted(
    model: nn.Module, grids: dict[str, Grid], args: Any, kwargs: Any
) -> tuple[nn.Module, list[tuple[str, Slow]]]:
    """The exported graph of the plain model with a slow grid after each named node, and these by name.

    Grids on inputs are left to the caller.
    """
    program = torch.export.export(model, args, kwargs)
    wanted = [(node.name, name, j) for name, node, j in named_nodes(program, model) if name in grids]
    module: Any = program.module()
    nodes = {node.name: node for node in module.graph.nodes}
    slow: list[tuple[str, Any]] = []
    for n, (node_name, name, j) in enumerate(wanted):
        node = nodes[node_name]
        if j is not None:
            node = next(user for user in node.users if user.args[1] == j)
        module.add_submodule(f"slow_{n}", Slow(grids[name]))
        slow.append((name, module.get_submodule(f"slow_{n}")))
        with module.graph.inserting_after(node):
            rounded = module.graph.call_module(f"slow_{n}", (node,))
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user, rounded=rounded: user is not rounded)
    module.recompile()
    return module, slow
