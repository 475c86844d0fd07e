"""Tune: a model whose forms can be trained, for one training loop; afterwards folded back to forms.

The leaves of each form are parameters (parts.py), and the user's modules are called with the values that
follow from them, so no layer is wrapped and no class is patched. Grids on edges learn with them
(simulate.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError
from tersor.forms import At, Dense, Form, Masked, uncoded
from tersor.forms.grid import Grid
from tersor.model.batches import device_of
from tersor.model.checkpointing import show, transformed
from tersor.model.edges import Call, trainable
from tersor.model.simulate import Simulated, key, tensors_of
from tersor.model.sites import Site
from tersor.model.state_dicts import same
from tersor.model.trainable_parts import MakePart, MaskedPart, Part, Structure, part


class TrainableForms(Simulated):
    """A model in training: parameters are the leaves of its forms and the scales of its edges' grids, buffers
    are its own. It is called as the model is: any training loop will do."""

    hidden = True  # the forms' leaves are what is trained, not the layers' own weights
    layout = torch.contiguous_format  # of convolution weights, which their outputs follow

    def __init__(
        self, model: nn.Module, forms: Mapping[str, Form], sites: Mapping[str, Site], train: Iterable[str],
        makers: Mapping[str, MakePart] | None = None, *,
        still: Iterable[str] = (), resting: Iterable[str] = (),
        edge_grids: Mapping[str, Grid] | None = None, example: Call | None = None,
    ):  # fmt: skip
        """`model` is copied. `train` names the sites whose leaves learn; the other parameters stand still.
        `still`: of these, sites that have parts all the same, for masks narrow there too. `resting`: paths of
        modules that stay in eval mode. `makers` says for some sites how their even grids learn, where not as
        AffinePart does. `edge_grids` are the grids whose scales learn, by the names of their edges; `example`
        then runs the model once, such as lambda net: net(x), to see that the edges are there and are the
        same in training."""
        trainable(model, edge_grids or (), example)
        super().__init__(copy.deepcopy(model), edge_grids)
        for module in self.net.modules():  # the same gradients, but dense: Adam and forms take no others
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
        """The sites whose leaves learn."""
        return list(self._site_names)

    def part_of(self, name: str) -> Part:
        return cast(Part, self.parts[key(name)])

    def begin(self, forms: Mapping[str, Form]) -> None:
        """Learn on from the weights of these forms: see Part.begin."""
        for name, form in forms.items():
            if name not in self._still:
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

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """What a forward has put in the place of a buffer (self.mean = ...) is what the next one goes on
        from."""
        with torch.no_grad():
            for name, site in self.sites.items():
                if site.kind == "buffer" and values[name] is not (own := getattr(self, key(name))):
                    cast(Tensor, own).copy_(values[name])

    def leave(self, values: Mapping[str, Tensor]) -> None:
        """The net's own tensors show what this forward was computed with, for gradient checkpointing runs
        parts of it again in backward, when nothing stands in their place."""
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
        """The trained forms of the sites that learn, and of the buffers that training moved; of sites that
        stand still what they were given as, under the masks there are now. Grids on edges: `fold_grids`.
        RefusedError where a leaf is no number any more: rounded to codes nobody would see it."""
        for name in self._site_names:
            if not all(bool(leaf.isfinite().all()) for leaf in self.part_of(name).parameters()):
                raise RefusedError(
                    f"{name}: training made NaN or infinity of it. Lower the learning rate, clip gradients "
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
    """The form with the masks that its part has by now; its numbers stay bit for bit."""
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
        new = {name: under_masks(one, old[name]) for name, one in part.parts()}
        return form if all(new[name] is old[name] for name in new) else plain.replace(**new)
    return form
