"""What has the same trace: tests begin and cut some thousand models of few structures, and torch.export takes
60 ms or more, so conftest.py traces each structure once a worker.

A model and its inputs are pickled into a key. Tensors that a graph is fed when it runs (parameters, buffers,
inputs) count as shapes, all others with their values. The code of torch, of Tersor and of the modules below
counts by name, because no test changes it. All other code counts by what it consists of: its instructions,
its defaults, its cells, and the globals that it names. Where that cannot be told there is no key.
"""

import io
import marshal
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

BY_NAME = {
    "torch",
    "tersor",
    "numpy",
    "collections",
    "builtins",
    "functools",
    "tiny",
    "nets",
    "stand_ins",
}
OWN_WAY = ("__getstate__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")
NO_CODE = {"__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__qualname__"}
KEPT = 300  # traces, of some 100 kB each and the tensors of its first model:
BYTES = 2**28  # of these

Trace = Callable[..., Any]


class Structure(pickle.Pickler):
    """What a trace depends on."""

    def __init__(self, data: io.BytesIO, fed: Mapping[int, torch.Tensor]):
        super().__init__(data)
        self.fed = fed
        self.places: dict[int, int] = {}
        self.seen: list[Any] = []  # kept, or another one could have its id
        self.within: set[int] = set()

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return None
        self.seen.append(obj)
        place = self.places.setdefault(id(obj), len(self.places))
        numbers = None if obj.is_floating_point() and id(obj) in self.fed else obj.tolist()
        facts = tuple(obj.shape), obj.stride(), str(obj.dtype), str(obj.device), obj.requires_grad
        return place, type(obj), *facts, numbers

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ModuleType):
            if not fixed(obj.__name__) and root(obj.__name__) not in sys.stdlib_module_names:
                raise pickle.PicklingError(f"a test may change what {obj.__name__} holds")
            return str, (obj.__name__,)
        if isinstance(obj, (staticmethod, classmethod, property)):
            parts = [getattr(obj, name, None) for name in ("__func__", "fget", "fset", "fdel")]
            return str, ((type(obj).__name__, parts),)
        if not isinstance(obj, (type, FunctionType)):
            own = [kind for kind in type(obj).__mro__ if not fixed(kind.__module__)]
            if any(name in vars(kind) for kind in own for name in OWN_WAY):
                raise pickle.PicklingError(f"{type(obj)} decides what of it is pickled")
            return NotImplemented
        if fixed(obj.__module__):
            return NotImplemented
        if id(obj) in self.within:
            return str, (obj.__qualname__,)
        self.within.add(id(obj))
        self.seen.append(obj)
        return str, ((obj.__qualname__, *(parts_of_class(obj) if isinstance(obj, type) else parts_of(obj))),)


def root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def fixed(module: str | None) -> bool:
    return root(module) in BY_NAME


def parts_of_class(kind: type) -> tuple[Any, ...]:
    return kind.__bases__, {name: item for name, item in vars(kind).items() if name not in NO_CODE}


def parts_of(function: FunctionType) -> tuple[Any, ...]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    read = {name: function.__globals__.get(name) for name in sorted(set(names_in(function.__code__)))}
    return marshal.dumps(function.__code__), function.__defaults__, function.__kwdefaults__, cells, read


def names_in(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes that some code reads."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def structure(model: Any, inputs: Any, training: bool) -> bytes | None:
    """The same for what has the same trace; None where that cannot be told."""
    data = io.BytesIO()
    fed = (*model.parameters(), *model.buffers(), *tree_leaves(inputs))
    try:
        Structure(data, {id(x): x for x in fed}).dump(
            (model, inputs, training, torch.is_grad_enabled(), torch.get_default_dtype())
        )
    except Exception:  # of any class: each object has its own reasons
        return None
    return data.getvalue()


def once(traced: Trace) -> Trace:
    """`traced`, with the graphs that it gave remembered."""
    graphs = dict[bytes, Any]()
    sizes = dict[bytes, int]()

    def remembered(model: Any, inputs: Any, *, training: bool = False) -> Any:
        key = structure(model, inputs, training)
        if key is None:
            return traced(model, inputs, training=training)
        if key not in graphs:
            found = traced(model, inputs, training=training)
            sizes[key] = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
            while graphs and (len(graphs) >= KEPT or sum(sizes.values()) > BYTES):
                oldest = next(iter(graphs))
                del graphs[oldest], sizes[oldest]
            graphs[key] = found
        return graphs[key]

    return remembered


def tables_once() -> None:
    """Each export reads the source of all functions of onnxscript, and lists all operators of torch, several
    times. From now on it is done once, and the lists are handed out as copies."""
    import onnxscript
    from torch._export import utils
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    traced = onnxscript.TracedOnnxFunction
    traced.function_ir = property(cache(traced.function_ir.fget))
    utils._materialize_cpp_cia_ops = cache(utils._materialize_cpp_cia_ops)
    made = cache(ONNXRegistry.from_torchlib)

    def from_torchlib(**version: int) -> ONNXRegistry:
        registry = copy(made(**version))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
