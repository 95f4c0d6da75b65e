"""The one mixed forward that training, evaluation and serving share.

It runs through the model's own modules (`hosted.py`), or on the decode path, if that can run the batch and agrees with the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from threading import Lock, local
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from trimtab.bases.spec import Spec
from trimtab.bases.weights.derived import Derived
from trimtab.forward import rowwise
from trimtab.forward.batch import Batch, Way
from trimtab.forward.decode_path import DecodePath
from trimtab.forward.decode_path_check import DecodePathMaker
from trimtab.forward.hosted import Hosted
from trimtab.forward.kv_cache import KVCache
from trimtab.forward.packs import PackedAdapter
from trimtab.methods.base import Method, Params, Site
from trimtab.places.shards import shards_of


class _Looked(local):
    """The cache for which the calling thread has looked at the weights closely."""

    cache: Callable[[], KVCache | None] = staticmethod(lambda: None)


class Attached(Hosted):
    """A base model with hosts and what is derived from its weights. cached_rows: rows that have run each way, in forwards with a cache."""

    def __init__(self, model: Any, *, spec: Spec | None = None, fast: bool = True):
        super().__init__(model, spec=spec, fast=fast)
        self._decode_path = Derived(self.weights, DecodePathMaker(self))
        self._looked = _Looked()
        self.cached_rows: Counter[str] = Counter(dict.fromkeys(Way, 0))
        self._counting = Lock()

    def compile(self, wanted: bool) -> str:
        """Compile the row-wise parts of the layers, or go back to those that are not; returns in words what runs. ConfigError where
        torch.compile does not work."""
        kernels, text = rowwise.RowWise(), ""
        if wanted and self.fast:
            kernels, text = rowwise.compile_row_wise(self.dtype, self.device)
        elif wanted:
            text = f"nothing is compiled: layers of {self.spec.model_type} run as transformers wrote them"
        self.row_wise.become(kernels)
        return text

    def pack(self, method: Method, params: dict[str, Tensor], sites: Sequence[Site]) -> PackedAdapter:
        """What the forward runs of one adapter; differentiable. sites: the method's, on this base (found once by the caller)."""
        edits, head, prefix = {}, None, None
        for site in sites:
            mine: Params = {t: params[site.key(t)] for t in site.shapes}
            if site.head:
                head = mine
                continue
            if not site.name:
                prefix = method.prefix(self.spec, mine, self.dtype)
                continue
            if site.experts:
                edits[site.name] = method.pack(site, mine, self.experts(site.name).dtype, None)
                continue
            host = self.host(site.name)
            module, matrix = host.module, host.matrix
            dtype = next((p.dtype for p in module.parameters(recurse=False)), self.dtype) if matrix is None else matrix.dtype
            edits[site.name] = method.pack(site, mine, dtype, matrix)
        return PackedAdapter(edits, prefix, invocation=method.invocation, head=head)

    @property
    def decode_path(self) -> DecodePath | None:
        """The decode path over the weights as they stand, made at the first batch that could use it; None where there is none."""
        return self._decode_path.get()

    def drop_copies(self) -> None:
        """Free what was computed from the weights: for whoever is about to change them. It comes back when it is needed."""
        self._decode_path.drop()

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, [T, H]. Gradients reach whatever the packs were made of.

        With a cache, members run in different ways where their edits ask for it (`DecodePath.ways`): each way's rows are a forward of their
        own, and results stand in the batch's order."""
        path = self._decode_path_for(batch)
        ways = {Way.MODEL: batch.members} if path is None else path.ways(batch)
        if path is not None:
            batch.head, batch.own_head = path.head, ways.get(Way.MODEL, frozenset())
        if len(ways) == 1:
            return self._run(path, next(iter(ways)), batch)
        hidden_TH = torch.empty(batch.total, self.spec.hidden_size, dtype=self.dtype, device=self.device)
        for way, members in ways.items():
            index = batch.index(members)
            hidden_TH[index] = self._run(path, way, batch.part(index))
        return hidden_TH

    def _run(self, path: DecodePath | None, way: Way, batch: Batch) -> Tensor:
        if batch.plan.cache is not None:
            with self._counting:
                self.cached_rows[way] += batch.total
        return self.forward_plain(batch) if path is None or way is Way.MODEL else path.forward(batch, way)

    def _decode_path_for(self, batch: Batch) -> DecodePath | None:
        """The decode path, where there is one and the batch is one of inference with a cache."""
        cache = batch.plan.cache
        if cache is None or torch.is_grad_enabled() or shards_of(self.model) is not None:  # it reads all layers' weights at once
            return None
        if self._looked.cache() is not cache:  # a new computation
            self.weights.look()
            self._looked.cache = ref(cache)
        return self.decode_path

    def head(self, hidden_RH: Tensor, batch: Batch, index: Sequence[int]) -> Tensor:
        """Logits [R, V] of rows `index` (ascending) of a batch, given their hidden states; edits of the head included."""
        own = batch.own_head | {m for group in batch.mix.groups.get(self.spec.head, ()) for m in group.members}
        if batch.members.isdisjoint(own):
            return self._own_head(hidden_RH, batch) if batch.head is None else batch.head(hidden_RH)
        asked = batch.subset(index)
        mine, others = asked.index(own), asked.index(batch.members - own)
        if batch.head is None or not others:
            return self._own_head(hidden_RH, asked)
        logits_RV = batch.head(hidden_RH)
        if mine:
            logits_RV[mine] = self._own_head(hidden_RH[mine], asked.subset(mine))
        return logits_RV

    def _own_head(self, hidden_RH: Tensor, batch: Batch) -> Tensor:
        logits, cap = self.head_plain(hidden_RH, batch), self.spec.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
