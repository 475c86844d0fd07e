"""Stock: the fixed list of modules that may replace a module, and the forms of their tensors.

identity    nn.Identity: all sites of the module are removed. Of a batch norm, children stay in a row
bias        the same layer with a bias of zeros
product     one layer for each factor of the weight: product.py
tucker      three convolutions for one whose kernel is such a product: convolution_factors.py; also cp, and
            spatial, which are two
attention   nn.MultiheadAttention whose head width need not be embed_dim / num_heads: attention.py
scaled      a linear layer with a factor, of ones, for each input: scaled_inputs.py
untie       an alias becomes a tensor of its own
zeros       zeros of the shape of the module's output, whose sites are removed: zeros.py
`replaced` changes the module; replaced_sites.py gives the sites that are removed and added. Both depend on
nothing but the change, so the same change to a fresh model and a file's forms has the same result.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError, SettingError, SiteError, did_you_mean
from tersor.forms import Dense, Form
from tersor.model import convolution_factors, product, scaled_inputs
from tersor.model.attention import Attention
from tersor.model.changes import Replace
from tersor.model.sites import Site
from tersor.model.zeros import Zeros

NORM = nn.modules.batchnorm._BatchNorm
Old = Mapping[str, tuple[Site, Form]]  # by name within the layer
New = dict[str, tuple[Form, str]]  # name within the layer -> (form, origin: "" for a tensor that stays)


class Stock:
    """One line of the table."""

    needs: ClassVar[Mapping[str, type]] = {}  # required settings
    takes: ClassVar[Mapping[str, type]] = {}  # optional settings

    def build(self, layer: Any, change: Replace) -> nn.Module:
        """The module that replaces the layer, which is not changed. New parameters are empty."""
        raise TypeError(f"{type(self).__name__} has no build")

    def forms(self, layer: Any, change: Replace, old: Old) -> New:
        """The forms of the new module's tensors."""
        return {name: (form, "") for name, (_, form) in old.items()}


class Identity(Stock):
    """Of timm's batch norms with an activation, the dropout and the activation stay, under their names."""

    def build(self, layer: Any, change: Replace) -> nn.Module:
        kept = dict(layer.named_children()) if isinstance(layer, NORM) else {}
        return nn.Sequential(OrderedDict(kept)) if kept else nn.Identity()

    def forms(self, layer: Any, change: Replace, old: Old) -> New:
        norm = isinstance(layer, NORM)
        return {name: (form, "") for name, (_, form) in old.items() if norm and "." in name}


class Bias(Stock):
    def build(self, layer: Any, change: Replace) -> nn.Module:
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            raise RefusedError(
                f"{change.module}: a {type(layer).__name__} takes no bias; linear layers and convolutions do"
            )
        if layer._parameters.get("weight") is None or layer._parameters.get("bias") is not None:
            why = "has a bias already" if "weight" in layer._parameters else "computes its weight"
            raise RefusedError(f"{change.module} {why}: a bias cannot be added")
        new = shallow_copy(layer)
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
        return emptied(
            product.build(layer, product.checked(layer, change.module, change.settings["layers"])), layer
        )

    def forms(self, layer: Any, change: Replace, old: Old) -> New:
        count = product.checked(layer, change.module, change.settings["layers"])
        return product.factor_forms(
            layer, change.module, count, {name: form for name, (_, form) in old.items()}
        )


class Factors(Stock):
    needs: ClassVar[Mapping[str, type]] = {"rank": int}  # tucker: of the inputs

    def __init__(self, how: str):
        self.how = how

    def build(self, layer: Any, change: Replace) -> nn.Module:
        rank = convolution_factors.checked(layer, change.module, self.how, change.settings["rank"])
        return emptied(convolution_factors.build(layer, self.how, rank), layer)

    def forms(self, layer: Any, change: Replace, old: Old) -> New:
        rank = convolution_factors.checked(layer, change.module, self.how, change.settings["rank"])
        own = {name: form for name, (_, form) in old.items()}
        return convolution_factors.factor_forms(layer, change.module, self.how, rank, own)


class Heads(Stock):
    takes: ClassVar[Mapping[str, type]] = {"num_heads": int, "head_dim": int}  # present values, if cut

    def build(self, layer: Any, change: Replace) -> nn.Module:
        if type(layer) is not nn.MultiheadAttention:
            raise RefusedError(
                f"{change.module}: a {type(layer).__name__} cannot become a stock attention; only "
                f"nn.MultiheadAttention can"
            )
        now: Any = change.settings
        return Attention(layer, **now)


class Scaled(Stock):
    def build(self, layer: Any, change: Replace) -> nn.Module:
        weight = layer._parameters.get("weight")
        return scaled_inputs.build(layer, change.module, None if weight is None else empty(weight))

    def forms(self, layer: Any, change: Replace, old: Old) -> New:
        site, weight = old["weight"]
        ones = Dense(torch.ones(weight.shape[1], dtype=site.torch_dtype))
        return {"factor": (ones, "weight ones"), **super().forms(layer, change, old)}


class Untie(Stock):
    needs: ClassVar[Mapping[str, type]] = {"tensor": str}

    def build(self, layer: Any, change: Replace) -> nn.Module:
        name = change.settings["tensor"]
        held = {**layer._parameters, **layer._buffers}
        if held.get(name) is None:
            raise SiteError(f"{change.module} has no tensor {name!r}; {did_you_mean(str(name), held)}")
        new = shallow_copy(layer)
        for kind in ("_parameters", "_buffers"):
            tensors = getattr(layer, kind).items()
            setattr(new, kind, {key: empty(value) if key == name else value for key, value in tensors})
        return new


class Silence(Stock):
    takes: ClassVar[Mapping[str, type]] = {"axis": int, "size": int, "outputs": int}

    def build(self, layer: Any, change: Replace) -> nn.Module:
        now: Any = change.settings
        return Zeros(change.module, layer, **now)

    def forms(self, layer: Any, change: Replace, old: Old) -> New:
        return {}


STOCK: dict[str, Stock] = {
    "identity": Identity(), "bias": Bias(), "product": Product(), "attention": Heads(), "scaled": Scaled(),
    "untie": Untie(), "zeros": Silence(), **{how: Factors(how) for how in convolution_factors.FACTORS},
}  # fmt: skip


def stock_of(change: Replace) -> Stock:
    """The entry of the table for a change; SettingError if there is none or its settings do not fit."""
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
    """The module of this name; SiteError with near misses if there is none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if path not in modules:
        raise SiteError(f"the model has no module {path!r}; {did_you_mean(path, filter(None, modules))}")
    return modules[path]


def names_of(model: nn.Module, layer: nn.Module) -> list[str]:
    """All names of a module, in the model's order."""
    return [path for path, module in model.named_modules(remove_duplicate=False) if module is layer]


def replaced(model: nn.Module, change: Replace) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(the model with the change made, the old module, the new module). Changes registered modules in place;
    if the model itself is replaced, the new module is returned as the model."""
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
    """Copy the training mode and the hooks of the old layer; RefusedError for a state dict hook."""
    new.train(layer.training)
    for key, hooks in vars(layer).items():
        if "state_dict" in key and hooks:
            raise RefusedError(f"{path} has a hook on its state dict, which may rename the new tensors")
        if key.endswith("hooks") or "_hooks_" in key or key == "_is_full_backward_hook":
            vars(new)[key] = hooks


def unfuse(model: nn.Module) -> None:
    """Make torch's transformer layers call their submodules if one was replaced, instead of reading weights
    in a fused kernel. Sets the attributes that the layers check before they use that kernel."""
    fused = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            parts = [(module.self_attn, nn.MultiheadAttention), (module.linear1, nn.Linear)]
            parts += [(module.linear2, nn.Linear), (module.norm1, nn.LayerNorm), (module.norm2, nn.LayerNorm)]
            scaled = any(isinstance(part, scaled_inputs.ScaledInputs) for part, _ in parts)
            if scaled or not all(isinstance(part, kind) for part, kind in parts):
                module.activation_relu_or_gelu = 0
                fused.append(module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(layer in fused for layer in module.layers):
            module.use_nested_tensor = False


def empty(like: Tensor) -> Tensor:
    """A tensor without elements, of the same dtype and device. Its form gives it a shape later."""
    new = torch.empty(0, dtype=like.dtype, device=like.device)
    return nn.Parameter(new, like.requires_grad) if isinstance(like, nn.Parameter) else new


def emptied(new: nn.Sequential, layer: nn.Module) -> nn.Sequential:
    """New layers with empty parameters like those of the layer that they replace."""
    for child in new:
        for name in [name for name, value in child._parameters.items() if value is not None]:
            child._parameters[name] = empty(layer._parameters[name])  # type: ignore[assignment, arg-type]
    return new


def shallow_copy(layer: nn.Module) -> Any:
    """A shallow copy of a module. Constructors and pickling may fail or use random numbers."""
    new = type(layer).__new__(type(layer))
    vars(new).update(vars(layer))
    return new
