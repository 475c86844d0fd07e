"""Stock: the modules that may take a module's place, as one closed table; and what becomes of its sites.

identity    nothing in its place: all its sites die
bias        the same layer with a bias of zeros
product     a weight of factors as one layer a factor: product.py
attention   nn.MultiheadAttention with a head width of its own: attention.py
untie       a tensor under another name becomes a tensor of its own
`replaced` changes the module; born.py says which sites die and which are born. Both follow from the change
alone, so that the same change to a fresh model and a file's forms gives the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError, SettingError, SiteError, did_you_mean
from tersor.forms import Dense, Form
from tersor.model import product
from tersor.model.attention import Attention
from tersor.model.changes import Replace
from tersor.model.sites import Site

Old = Mapping[str, tuple[Site, Form]]  # by name within the layer
New = dict[str, tuple[Form, str]]  # name within the layer -> (form, where it comes from: "" for what stays)


class Stock:
    """One line of the table."""

    needs: ClassVar[Mapping[str, type]] = {}  # settings that have to be given
    takes: ClassVar[Mapping[str, type]] = {}  # settings that may be given

    def build(self, layer: Any, change: Replace) -> nn.Module:
        """What takes the layer's place; the layer stays as it is. New parameters are empty."""
        raise TypeError(f"{type(self).__name__} has no build")

    def forms(self, layer: Any, change: Replace, old: Old) -> New:
        """The tensors of what takes its place."""
        return {name: (form, "") for name, (_, form) in old.items()}


class Identity(Stock):
    def build(self, layer: Any, change: Replace) -> nn.Module:
        return nn.Identity()

    def forms(self, layer: Any, change: Replace, old: Old) -> New:
        return {}


class Bias(Stock):
    def build(self, layer: Any, change: Replace) -> nn.Module:
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            raise RefusedError(
                f"{change.module}: a {type(layer).__name__} takes no bias; linear layers and convolutions do"
            )
        if layer._parameters.get("weight") is None or layer._parameters.get("bias") is not None:
            why = "has a bias already" if "weight" in layer._parameters else "computes its weight"
            raise RefusedError(f"{change.module} {why}: it cannot be given a bias")
        new = shallow(layer)
        new._parameters = {**layer._parameters, "bias": empty(layer.weight)}
        return new

    def forms(self, layer: Any, change: Replace, old: Old) -> New:
        site, weight = old["weight"]
        size = weight.shape[1] * layer.groups if site.kind == "convtranspose" else weight.shape[0]
        zeros = Dense(torch.zeros(size, dtype=site.torch_dtype))
        return {**super().forms(layer, change, old), "bias": (zeros, "bias zeros")}


class Product(Stock):
    needs: ClassVar[Mapping[str, type]] = {"layers": int}

    def build(self, layer: Any, change: Replace) -> nn.Module:
        new = product.build(layer, product.checked(layer, change.module, change.settings["layers"]))
        for child in new:
            for name in [name for name, value in child._parameters.items() if value is not None]:
                child._parameters[name] = empty(layer._parameters[name])  # type: ignore[assignment]
        return new

    def forms(self, layer: Any, change: Replace, old: Old) -> New:
        count = product.checked(layer, change.module, change.settings["layers"])
        return product.formed(layer, change.module, count, {name: form for name, (_, form) in old.items()})


class Heads(Stock):
    takes: ClassVar[Mapping[str, type]] = {"num_heads": int, "head_dim": int}  # as they are now, if cut

    def build(self, layer: Any, change: Replace) -> nn.Module:
        if type(layer) is not nn.MultiheadAttention:
            raise RefusedError(
                f"{change.module}: a {type(layer).__name__} cannot become a stock attention; only "
                f"nn.MultiheadAttention can"
            )
        now: Any = change.settings
        return Attention(layer, **now)


class Untie(Stock):
    needs: ClassVar[Mapping[str, type]] = {"tensor": str}

    def build(self, layer: Any, change: Replace) -> nn.Module:
        name = change.settings["tensor"]
        held = {**layer._parameters, **layer._buffers}
        if held.get(name) is None:
            raise SiteError(f"{change.module} has no tensor {name!r}; {did_you_mean(str(name), held)}")
        new = shallow(layer)
        for kind in ("_parameters", "_buffers"):
            tensors = getattr(layer, kind).items()
            setattr(new, kind, {key: empty(value) if key == name else value for key, value in tensors})
        return new


STOCK: dict[str, Stock] = {
    "identity": Identity(), "bias": Bias(), "product": Product(), "attention": Heads(), "untie": Untie(),
}  # fmt: skip


def stock_of(change: Replace) -> Stock:
    """The line of the table that a change means, if its settings fit."""
    if change.stock not in STOCK:
        raise SettingError(
            f"{change.module}: there is no stock {change.stock!r}; {did_you_mean(change.stock, STOCK)}"
        )
    stock = STOCK[change.stock]
    given, known = set(change.settings), {**stock.needs, **stock.takes}
    why = [f"needs the setting {key!r}" for key in sorted(set(stock.needs) - given)]
    why += [f"has no setting {key!r}" for key in sorted(given - set(known))]
    why += [
        f"takes no {change.settings[key]!r} for {key!r}"
        for key in sorted(given & set(known))
        if type(change.settings[key]) is not known[key]
    ]
    if why:
        raise SettingError(f"{change.module}: stock {change.stock!r} {why[0]}")
    return stock


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module of this name; SiteError with near misses."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if path not in modules:
        raise SiteError(f"the model has no module {path!r}; {did_you_mean(path, filter(None, modules))}")
    return modules[path]


def names_of(model: nn.Module, layer: nn.Module) -> list[str]:
    """All names of a module, in the model's order."""
    return [path for path, module in model.named_modules(remove_duplicate=False) if module is layer]


def replaced(model: nn.Module, change: Replace) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(the model with the change made, the module that went, the one that came). Registered modules only, and
    in place, but for the model itself where it is what is replaced."""
    layer, stock = module_at(model, change.module), stock_of(change)
    new = stock.build(layer, change)
    if type(new) is not type(layer):
        inherit(new, layer, change.module)
    for path in names_of(model, layer):
        above, _, name = path.rpartition(".")
        if not path:
            return new, layer, new
        parent = model.get_submodule(above)
        if isinstance(parent, nn.MultiheadAttention) and type(new) is not type(layer):
            raise RefusedError(
                f"{path}: nn.MultiheadAttention reads its weight and does not call it. Replace the attention "
                f"first: Replace({above!r}, 'attention')"
            )
        parent._modules[name] = new
    return model, layer, new


def inherit(new: nn.Module, layer: nn.Module, path: str) -> None:
    """What hangs on a module and is not of its kind: mode and hooks."""
    new.train(layer.training)
    for key, hooks in vars(layer).items():
        if "state_dict" in key and hooks:
            raise RefusedError(f"{path} has a hook on its state dict, and its tensors would have other names")
        if key.endswith("hooks") or "_hooks_" in key or key == "_is_full_backward_hook":
            vars(new)[key] = hooks


def unfused(model: nn.Module) -> None:
    """Layers of torch's transformers that read the weights of their parts are told to call the parts, where
    one is no longer what they take it for. Their own conditions for that are what is set."""
    fused = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            parts = [(module.self_attn, nn.MultiheadAttention), (module.linear1, nn.Linear)]
            parts += [(module.linear2, nn.Linear), (module.norm1, nn.LayerNorm), (module.norm2, nn.LayerNorm)]
            if not all(isinstance(part, kind) for part, kind in parts):
                module.activation_relu_or_gelu = 0
                fused.append(module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(layer in fused for layer in module.layers):
            module.use_nested_tensor = False


def empty(like: Tensor) -> Tensor:
    """A tensor of no elements where this one is; its shape comes with its form."""
    new = torch.empty(0, dtype=like.dtype, device=like.device)
    return nn.Parameter(new, like.requires_grad) if isinstance(like, nn.Parameter) else new


def shallow(layer: nn.Module) -> Any:
    """The same module once more, with the same parts; a constructor or a pickle might refuse or draw."""
    new = type(layer).__new__(type(layer))
    vars(new).update(vars(layer))
    return new
