"""Trainable forms: a module whose parameters are the leaves of forms, for training; then forms again.

The leaves of each form are parameters (trainable_parts.py), and the user's modules are called with the
weights computed from them, so no layer is wrapped and no class is patched. The scales of grids on edges are
trained too (simulate.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Self, cast

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError
from tersor.forms import At, Dense, Form, Masked, uncoded
from tersor.forms.grid import Grid
from tersor.model.batches import device_of
from tersor.model.checkpointing import show, transformed
from tersor.model.edges import Call, check_same_in_training
from tersor.model.simulate import Simulated, key, tensors_of
from tersor.model.sites import Site
from tersor.model.state_dicts import same
from tersor.model.trainable_parts import MakePart, MaskedPart, Part, Structure, part


class TrainableForms(Simulated):
    """A model in training: its parameters are the leaves of its forms and the scales of grids on edges; its
    buffers are the model's. It is called like the model, in any training loop."""

    hidden = True  # the forms' leaves are trained, not the layers' own weights
    layout = torch.contiguous_format  # of convolution weights; it determines the layout of their outputs
    moved: torch.dtype | None = None  # what half(), bfloat16() or float() made of floats; None: as given

    def __init__(
        self, model: nn.Module, forms: Mapping[str, Form], sites: Mapping[str, Site], train: Iterable[str],
        makers: Mapping[str, MakePart] | None = None, *,
        still: Iterable[str] = (), resting: Iterable[str] = (),
        edge_grids: Mapping[str, Grid] | None = None, example: Call | None = None,
    ):  # fmt: skip
        """`model` is copied. `train` names the sites whose leaves are trained; other parameters are frozen.
        `still`: frozen sites that have parts nevertheless, because their masks may be narrowed. `resting`:
        paths of modules that stay in eval mode. `makers`: by site, the part for a uniform grid if it is not
        AffinePart. `edge_grids`: grids whose scales are trained, by the names of their edges; `example` then
        runs the model once, such as lambda net: net(x), to check that the edges exist and are the same in
        training."""
        check_same_in_training(model, edge_grids or (), example)
        super().__init__(copy.deepcopy(model), edge_grids)
        for module in self.net.modules():  # the same gradients, but dense: Adam and forms need dense ones
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                module.sparse = False
        self.sites, self._site_names, self._given = sites, list(train), forms
        self._still, self._resting = list(still), frozenset(resting)
        others = makers or {}
        self.parts = nn.ModuleDict(
            {
                key(name): part(At(uncoded(forms[name]), sites[name].axis), others.get(name))
                for name in (*self._site_names, *self._still)
            }
        )
        for name in self._still:
            self.part_of(name).requires_grad_(False)
        for name, site in sites.items():
            if key(name) not in self.parts:
                value = forms[name].decode().to(site.torch_dtype).clone()
                self.register_buffer(key(name), value)
        self.to(device_of(model))

    @property
    def learning(self) -> list[str]:
        """The sites whose leaves are trained."""
        return list(self._site_names)

    def part_of(self, name: str) -> Part:
        return cast(Part, self.parts[key(name)])

    def begin(self, forms: Mapping[str, Form]) -> None:
        """Start training from the weights of these forms: see Part.begin."""
        for name, form in forms.items():
            if name not in self._still:
                self.part_of(name).begin(uncoded(form))

    def values(self) -> dict[str, Tensor]:
        """The model's present tensors, by site."""
        values = {}
        for name, site in self.sites.items():
            if key(name) in self.parts:
                wide = site.torch_dtype.is_floating_point and self.moved is not None
                value = self.part_of(name).value().to(self.moved if wide else site.torch_dtype)
                values[name] = value.contiguous(memory_format=self.layout) if value.ndim == 4 else value
            else:
                values[name] = cast(Tensor, getattr(self, key(name)))
        return values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """After half(), bfloat16() or float() the weights have that dtype in a forward, as those of any
        module."""
        dtypes = {fn(torch.empty(0, dtype=dtype)).dtype for dtype in (torch.float16, torch.bfloat16)}
        if len(dtypes) == 1:  # else `fn` keeps dtypes, as to(device) does
            (self.moved,) = dtypes
        return super()._apply(fn, recurse)

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Copy the buffers that a forward has reassigned (self.mean = ...), for the next forward."""
        with torch.no_grad():
            for name, site in self.sites.items():
                if site.kind == "buffer" and values[name] is not (own := getattr(self, key(name))):
                    cast(Tensor, own).copy_(values[name])

    def leave(self, values: Mapping[str, Tensor]) -> None:
        """Let the net's own tensors share the values of this forward. Gradient checkpointing runs parts again
        in backward, when the net's tensors are no longer replaced."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed():
            own = tensors_of(self.net)
            for name, value in values.items():
                show(own[name], value)

    def train(self, mode: bool = True) -> TrainableForms:
        super().train(mode)
        self.net.train(mode)
        for path, module in self.net.named_modules() if self._resting else ():
            module.training = module.training and path not in self._resting
        return self

    def fold(self) -> dict[str, Form]:
        """The forms of trained sites and of the buffers that training changed; frozen sites keep their given
        forms, under their present masks. Grids on edges: `fold_grids`. RefusedError if a leaf is NaN or
        infinite: rounding to codes would hide it."""
        for name in self._site_names:
            if not all(bool(leaf.isfinite().all()) for leaf in self.part_of(name).parameters()):
                raise RefusedError(
                    f"{name}: it became NaN or infinite in training. Lower the learning rate, clip gradients "
                    f"(max_grad_norm=1), or look for NaN in the data and the loss"
                )
        folded = {name: self.part_of(name).fold() for name in self._site_names}
        folded |= {name: under_masks(self.part_of(name), self._given[name]) for name in self._still}
        for name, site in self.sites.items():
            now = cast(Tensor, getattr(self, key(name))).detach().cpu() if site.kind == "buffer" else None
            if now is not None and not same(now, self._given[name].decode()):
                folded[name] = Dense(now.clone())
        return folded


def under_masks(part: Part, form: Form) -> Form:
    """The form with the present masks of its part; its values keep their bits."""
    if isinstance(part, MaskedPart) and isinstance(form := uncoded(form), Masked):
        keep, body = part.keep.detach().cpu().clone(), under_masks(part.body, form.body)
        if torch.equal(keep, form.keep.decode()) and body is form.body:
            return form
        if isinstance(body, Dense):  # as MaskedPart.fold
            body = Dense(torch.where(keep, body.array, torch.zeros_like(body.array)))
        return Masked(Dense(keep), body)
    if isinstance(part, Structure):
        plain = uncoded(form)
        old = plain.children()
        new = {name: under_masks(inner, old[name]) for name, inner in part.parts()}
        return form if all(new[name] is old[name] for name in new) else plain.replace(**new)
    return form
