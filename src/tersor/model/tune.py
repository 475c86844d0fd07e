"""Tune: a model whose forms can be trained, for one training loop; afterwards folded back to forms.

Each form becomes a part with parameters and a differentiable value: part.py. The user's modules are called
functionally with these values, so no layer is wrapped and no class is patched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tersor.forms import At, Dense, Form, uncoded
from tersor.model.part import Grid, Part, part
from tersor.model.sites import Site


class Tuned(nn.Module):
    """A model in training: parameters are the leaves of its forms, buffers are its own."""

    net: nn.Module
    layout = torch.contiguous_format  # of convolution weights, which their outputs follow

    def __init__(
        self, model: nn.Module, forms: Mapping[str, Form], sites: Mapping[str, Site], train: Iterable[str],
        grids: Mapping[str, Grid] | None = None,
    ):  # fmt: skip
        """`model` is copied. `train` names the sites whose leaves learn; the other parameters stand still.
        `grids` says for some of them how their even grids learn, where not as AffinePart does."""
        super().__init__()
        self.sites, self._site_names, self._given = sites, list(train), forms
        net = copy.deepcopy(model)
        # Hidden from parameters(): the forms' leaves are what is trained, not the layers' own weights.
        object.__setattr__(self, "net", net)
        others = grids or {}
        self.parts = nn.ModuleDict(
            {
                key(name): part(At(uncoded(forms[name]), sites[name].axis), others.get(name))
                for name in self._site_names
            }
        )
        for name, site in sites.items():
            if name not in self._site_names:
                value = forms[name].decode().to(site.torch_dtype).clone()
                self.register_buffer(key(name), value)
        self.to(next((p.device for p in model.parameters()), torch.device("cpu")))

    def part_of(self, name: str) -> Part:
        return cast(Part, self.parts[key(name)])

    def begin(self, forms: Mapping[str, Form]) -> None:
        """Learn on from the weights of these forms: see Part.begin."""
        for name, form in forms.items():
            self.part_of(name).begin(uncoded(form))

    def values(self) -> dict[str, Tensor]:
        """What the model's tensors are now, by site."""
        values = {}
        for name, site in self.sites.items():
            if key(name) in self.parts:
                value = self.part_of(name).value().to(site.torch_dtype)
                values[name] = value.contiguous(memory_format=self.layout) if value.ndim == 4 else value
            else:
                values[name] = cast(Tensor, getattr(self, key(name)))
        return values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.net, self.values(), args, kwargs)  # ties follow their first name

    def train(self, mode: bool = True) -> Tuned:
        super().train(mode)
        self.net.train(mode)
        return self

    def fold(self) -> dict[str, Form]:
        """The trained forms of the sites that learn, and of the buffers that training moved."""
        folded = {name: self.part_of(name).fold() for name in self._site_names}
        for name, site in self.sites.items():
            now = cast(Tensor, getattr(self, key(name))).detach().cpu() if site.kind == "buffer" else None
            if now is not None and not torch.equal(now, self._given[name].decode()):
                folded[name] = Dense(now.clone())
        return folded


def key(name: str) -> str:
    """A site's name as a module's: dots are not allowed there, nor names that modules use themselves."""
    return "/" + name.replace(".", "/")
