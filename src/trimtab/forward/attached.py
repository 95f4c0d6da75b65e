"""Attach: the frozen base with a host at each site, and the one mixed forward that training, evaluation and serving share.

The base is a `transformers` causal LM, loaded as it is; no parameter is replaced or written. A `Host` stands in for a module's `forward`
and asks the batch at hand which edits touch it. Hidden states flow flat, [1, T, H], with explicit positions; attention is `attention.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimtab.bases.structure import read_spec
from trimtab.bases.weights.derived import Derived, Weights
from trimtab.forward import attention, rowwise
from trimtab.forward.attention import KVCache
from trimtab.forward.batch import Batch
from trimtab.forward.decode_path import DecodePath
from trimtab.forward.decode_path_check import DecodePathMaker
from trimtab.forward.hosts import Host, weight_OI
from trimtab.forward.packs import PackedAdapter
from trimtab.forward.replica import ours
from trimtab.methods.base import Method, Params, Site


class Attached:
    """A base model with hosts. One at a time runs a forward: the batch at hand is state.

    activation_checkpointing: forwards with gradients keep each decoder layer's input only, and the backward runs the layer again (Chen et
    al. 2016, arXiv:1604.06174). It may be set between any two forwards.
    """

    activation_checkpointing = False

    def __init__(self, model: Any):
        self.model, self.spec = model, read_spec(model)
        self.device, self.dtype = model.device, model.dtype
        self.batch: Batch | None = None
        self.body, self.head_module = model.get_submodule(self.spec.body), model.get_submodule(self.spec.head)
        self.embedding = model.get_submodule(self.spec.embedding)
        self._index = {name: i for i, (name, _) in enumerate(model.named_modules())}
        self._hosts: dict[str, Host] = {}
        self.weights = Weights(model, [m.name for m in self.spec.modules.values() if m.kind not in ("norm", "experts")])
        self.head_weight = self.weights.of[self.spec.head]
        self._decode_path = Derived(self.weights, DecodePathMaker(self))
        self._cache: Callable[[], KVCache | None] = lambda: None  # the one for which the weights were looked at closely
        model.eval().requires_grad_(False)
        model.set_attn_implementation(attention.NAME)
        self.row_wise = rowwise.RowWise()
        self.fast = rowwise.install(model, self.row_wise)
        for layer in model.get_submodule(self.spec.layer_list):
            layer.forward = ours(self._recomputing(layer.forward))

    def compile(self, wanted: bool) -> str:
        """Compile the row-wise parts of the layers, or go back to those that are not; returns in words what runs. ConfigError where
        torch.compile does not work."""
        kernels, text = rowwise.RowWise(), ""
        if wanted and self.fast:
            kernels, text = rowwise.compile_row_wise(self.embedding.weight)
        elif wanted:
            text = f"nothing is compiled: layers of {self.spec.model_type} run as transformers wrote them"
        self.row_wise.become(kernels)
        return text

    def pack(self, method: Method, params: dict[str, Tensor], sites: Sequence[Site]) -> PackedAdapter:
        """What the forward runs of one adapter; differentiable. sites: the method's, on this base (found once by the caller)."""
        edits = {}
        for site in sites:
            mine: Params = {t: params[site.key(t)] for t in site.shapes}
            if not site.name:
                return PackedAdapter({}, method.prefix(self.spec, mine, self.dtype))
            module = self._host(site.name).module
            weight = weight_OI(module) if hasattr(module, "weight") else torch.empty(0, dtype=self.dtype, device=self.device)
            edits[site.name] = method.pack(site, mine, weight)
        return PackedAdapter(edits)

    def _host(self, name: str) -> Host:
        if name not in self._hosts:
            module = self.model.get_submodule(name)
            self._hosts[name] = Host(self, name, module, self._index[name])
            module.forward = self._hosts[name]
        return self._hosts[name]

    def edited(self, name: str, x_TI: Tensor, batch: Batch, original: Callable[[Tensor], Tensor]) -> Tensor:
        """A module with the batch's edits around it, on flat rows; original: how to run the module itself."""
        return self._host(name).edited(x_TI, batch, original)

    @property
    def decode_path(self) -> DecodePath | None:
        """The decode path over the weights as they stand, made at the first batch that could use it; None where there is none."""
        return self._decode_path.get()

    def drop_copies(self) -> None:
        """Free what was computed from the weights: for whoever is about to change them. It comes back when it is needed."""
        self._decode_path.drop()

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, [T, H]. Gradients reach whatever the packs were made of."""
        path = self._decode_path_for(batch)
        batch.head = None if path is None else path.head
        return self.forward_plain(batch) if path is None else path.forward(batch)

    def _decode_path_for(self, batch: Batch) -> DecodePath | None:
        """The decode path, where it takes this batch."""
        cache = batch.plan.cache
        if cache is None or torch.is_grad_enabled():
            return None
        if self._cache() is not cache:  # a new computation
            self.weights.look()
            self._cache = ref(cache)
        path = self.decode_path
        return path if path is not None and path.takes(batch) else None

    def forward_plain(self, batch: Batch) -> Tensor:
        """The same through the model's own modules, whatever the batch."""
        with self._running(batch):
            x_TH = self.embedding(batch.ids_T[None])[0]
            for start, stop, embeds_NH in batch.embeds:
                x_TH = torch.cat([x_TH[:start], embeds_NH.to(x_TH.dtype), x_TH[stop:]])
            out = self.body(inputs_embeds=x_TH[None], position_ids=batch.position_T[None], use_cache=False, trimtab_plan=batch.plan)
        return out.last_hidden_state[0]

    def _recomputing(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A layer's forward that obeys `activation_checkpointing`. The backward runs when the batch at hand is long another, or none, so
        the layer takes its own along. Dropout masks are drawn from (seed, site), so they come out alike with no generator's state kept."""

        def layer(*args: Any, **kwargs: Any) -> Tensor:
            batch = self.batch
            if batch is None or not self.activation_checkpointing or not torch.is_grad_enabled():
                return forward(*args, **kwargs)

            def again(*args: Any, **kwargs: Any) -> Tensor:
                with self._running(batch):
                    return forward(*args, **kwargs)

            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return layer

    def head(self, hidden_RH: Tensor, batch: Batch, index: Sequence[int]) -> Tensor:
        """Logits [R, V] of rows `index` (ascending) of a batch, given their hidden states; edits of the head included."""
        edited = self.spec.head in batch.mix.groups
        if not edited and batch.head is not None:
            return batch.head(hidden_RH)
        with self._running(batch.subset(index) if edited else batch):
            logits = self.head_module(hidden_RH[None])[0]
        cap = self.spec.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @contextmanager
    def _running(self, batch: Batch) -> Iterator[None]:
        previous, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = previous
