"""A base with hosts, and the mixed forward through the model's own modules.

The base is a `transformers` causal LM, loaded as it is; no parameter is replaced or written. A `Host` stands in for a module's `forward`
and asks which edits of the batch touch it. Hidden states flow flat, [1, T, H], with explicit positions; attention is `attention.py`'s.

The batch is passed through transformers' own forward: to each decoder layer, which hands the batch's plan to its attention. Only hosts find
it elsewhere, with the thread that calls them (`AtHand`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimtab.bases.spec import Spec
from trimtab.bases.structure import read_spec
from trimtab.bases.weights.derived import Weights
from trimtab.bases.weights.experts import Experts
from trimtab.errors import BaseError
from trimtab.forward import attention, own_forwards, rowwise
from trimtab.forward.batch import Batch
from trimtab.forward.experts import ExpertsHost
from trimtab.forward.hosts import AtHand, Host
from trimtab.forward.packs import Group
from trimtab.forward.replica import ours
from trimtab.forward.routers import RouterHost
from trimtab.ops import add_noise


class Hosted:
    """A base model with hosts. Several threads may run forwards and backwards of one at a time.

    spec: the model's, where it is known. fast: modules get faster forwards where these agree with their own (`rowwise.py`).
    activation_checkpointing: forwards with gradients keep each decoder layer's input only, and the backward runs the layer again (Chen et
    al. 2016, arXiv:1604.06174). It may be set between any two forwards.
    """

    activation_checkpointing = False

    def __init__(self, model: Any, *, spec: Spec | None = None, fast: bool = True):
        self.model, self.spec = model, spec or read_spec(model)
        self.device, self.dtype = model.device, model.dtype
        self.body, self.head_module = model.get_submodule(self.spec.body), model.get_submodule(self.spec.head)
        self.embedding = model.get_submodule(self.spec.embedding)
        self.weights = Weights(
            model, [m.name for m in self.spec.modules.values() if m.bits is not None or m.kind not in ("norm", "experts", "router")]
        )
        self.head_weight = self.weights.of[self.spec.head]
        self._at_hand = AtHand()
        names = [name for name, _ in model.named_modules()] + [m.name for m in self.spec.modules.values() if m.kind == "experts"]
        self._index = {name: i for i, name in enumerate(names)}
        self._hosts: dict[str, Host] = {}
        self._expert_hosts: dict[str, ExpertsHost] = {}
        self._hosting = Lock()  # two threads must not put two hosts in one place, one around the other
        model.eval().requires_grad_(False)
        model.set_attn_implementation(attention.NAME)
        self.row_wise = rowwise.RowWise()
        self.fast = rowwise.install(model, self.row_wise) if fast else []
        for layer in model.get_submodule(self.spec.layer_list):
            layer.forward = ours(self._layer(layer.forward))
        attention.KEPT.update({model.get_submodule(layer.attention): self._at_hand for layer in self.spec.layers})
        own_forwards.install(model)
        for m in self.spec.modules.values():
            if m.kind == "experts" and m.bits is not None:
                if not m.vectors:
                    raise BaseError(
                        f"{m.name} of this {self.spec.model_type} base is packed, and used in a way that trimtab does not know",
                        fix="use the dense base",
                    )
                self.experts(m.name)

    def host(self, name: str) -> Host:
        """The host of a module, put in its place at the first call."""
        with self._hosting:
            if name not in self._hosts:
                module = self.model.get_submodule(name)
                about = {"block": name not in self.spec.modules, "written": self.spec.writes_results}
                if name in self.spec.modules and self.spec.modules[name].kind == "router":
                    host: Host = RouterHost(self._at_hand, name, module, self._index[name])
                else:
                    host = Host(self._at_hand, name, module, self.weights.of.get(name), self._index[name], **about)
                module.forward = self._hosts[name] = host
            return self._hosts[name]

    def experts(self, parameter: str) -> Experts:
        """The matrices of a parameter of experts. Its module gets a host at the first call."""
        name, _, own = parameter.rpartition(".")
        module = self.model.get_submodule(name)
        with self._hosting:
            if name not in self._expert_hosts:
                inside = [m for m in self.spec.modules.values() if m.kind == "experts" and m.name.rpartition(".")[0] == name]
                sites = {m.name.rpartition(".")[2]: self._index[m.name] for m in inside}
                module.forward = self._expert_hosts[name] = ExpertsHost(self._at_hand, name, module, sites)
        return Experts(module, own)

    def edited(
        self, name: str, x_TI: Tensor, batch: Batch, original: Callable[[Tensor], Tensor], groups: Sequence[Group] | None = None
    ) -> Tensor:
        """A module with the batch's edits around it (see `Host.edited`)."""
        return self.host(name).edited(x_TI, batch, original, groups)

    def embed(self, batch: Batch) -> Tensor:
        """The embeddings of a batch's tokens, [T, H]."""
        with self._at_hand.running(batch):
            x_TH: Tensor = self.embedding(batch.ids_T[None])[0]
        return x_TH

    def forward_plain(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, [T, H], through the model's own modules, whatever the batch. They are multiplied with what
        the class multiplies its logits with."""
        x_TH = add_noise(self.embed(batch), batch.noise)
        for start, stop, embeds_NH in batch.embeds:
            x_TH = torch.cat([x_TH[:start], embeds_NH.to(x_TH.dtype), x_TH[stop:]])
        with self._at_hand.running(batch):
            given = {"per_layer_inputs": self.body.get_per_layer_inputs(batch.ids_T[None])} if self.spec.layer_embeddings else {}
            out = self.body(inputs_embeds=x_TH[None], position_ids=batch.position_T[None], use_cache=False, trimtab_batch=batch, **given)
        hidden_TH: Tensor = out.last_hidden_state[0]
        return hidden_TH if self.spec.logit_scale == 1 else hidden_TH * self.spec.logit_scale

    def normed(self, hidden_RH: Tensor) -> Tensor:
        """Rows of what a forward gives, fp32, as the final norm leaves them: without what the class multiplies its logits with."""
        return hidden_RH.float() if self.spec.logit_scale == 1 else hidden_RH.float() / self.spec.logit_scale

    def head_plain(self, hidden_RH: Tensor, batch: Batch) -> Tensor:
        """Logits [R, V] of a batch's rows before the soft cap, through the model's own head."""
        with self._at_hand.running(batch):
            return self.head_module(hidden_RH[None])[0]

    def _layer(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A decoder layer's forward that takes the batch, hands its plan on, and obeys `activation_checkpointing`. The backward may run on
        another thread and beside other forwards, so the layer then runs with the batch that it was given. Dropout masks are
        computed from the batch's keys, so they come out alike with no generator's state kept."""

        def layer(*args: Any, trimtab_batch: Batch | None = None, **kwargs: Any) -> Any:
            if trimtab_batch is None:
                return forward(*args, **kwargs)  # whose attention says what is wrong
            kwargs["trimtab_plan"] = trimtab_batch.plan
            if not self.activation_checkpointing or not torch.is_grad_enabled():
                return forward(*args, **kwargs)

            def again(*args: Any, **kwargs: Any) -> Any:
                with self._at_hand.running(trimtab_batch):
                    return forward(*args, **kwargs)

            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return layer
