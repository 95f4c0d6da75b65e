"""Base: a loaded base model and what one does with it: logits of mixed batches, generation, initial values for adapters.

base.logits([ids_a, ids_b], adapters=[adapter, None])     one mixed forward
base.generate(["…"], adapters=[adapter])                  one mixed batch, with a KV cache
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trimtab import bases
from trimtab.bases.progress import quiet_transformers
from trimtab.bases.quantization_notes import quantization_settings
from trimtab.bases.sharding import shard
from trimtab.bases.spec import Spec
from trimtab.bases.template import encode_prompt, end_of_turn_id
from trimtab.bases.weights import Weight, weight_of
from trimtab.bases.weights.derived import Stamp, hold
from trimtab.decode.generate import Sampling, generate
from trimtab.errors import ConfigError, TrimtabError
from trimtab.forward.arena import in_order
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE, Batch, Piece, make_batch
from trimtab.forward.heads import head_scores
from trimtab.forward.packs import Mix, PackedAdapter, together
from trimtab.forward.proof import prove
from trimtab.methods.base import Method, Site
from trimtab.places.shards import Shards, visited


class AdapterLike(Protocol):
    """What the forward needs of an adapter: its method, its sites on this base, its tensors by `Site.key`."""

    method: Method
    sites: Sequence[Site]
    params: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Kept:
    """An adapter packed for inference, and of what: its method, its tensors, the generation of the base's weights."""

    packed: PackedAdapter
    method: Method
    params: Stamp
    generation: int


class Base:
    """One frozen base model. name, path: as loaded; path is a folder that transformers can read. fingerprint: of the stored weights
    ("sha256:…"). base_differs: whether adapters are taken that were trained on a base of another fingerprint, as on this one in another
    precision. BaseError where the model cannot be had exactly: see `forward/proof.py`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "",
        path: Path | None = None,
        fingerprint: str = "",
        base_differs: bool = False,
    ):
        self.tokenizer, self.name, self.path, self.fingerprint = tokenizer, name, path, fingerprint
        self.base_differs = base_differs
        with quiet_transformers():  # other threads build no model while this one is compared with its class
            self.attached = Attached(model, spec=prove(model))
        self._source: Any = None
        self._packed: WeakKeyDictionary[AdapterLike, _Kept] = WeakKeyDictionary()

    @property
    def model(self) -> Any:
        return self.attached.model

    @property
    def spec(self) -> Spec:
        return self.attached.spec

    @property
    def device(self) -> torch.device:
        return self.attached.device

    @property
    def dtype(self) -> torch.dtype:
        return self.attached.dtype

    @property
    def packed_as(self) -> str:
        """The formats of the matrices that are packed: "nf4"; "" where all are dense."""
        return ", ".join(sorted({w.name for w in self.attached.weights.of.values() if not w.stored_dense}))

    def shard(self, shards: Shards) -> None:
        """Keep this rank's part of the base alone. Every rank does so, and uses the base only as `places.shards` says."""
        shard(self.model, self.spec, shards)
        self.attached.weights.touch()
        self.attached.drop_copies()

    # ---- forward ----

    def mix(
        self, adapters: Sequence[AdapterLike | None], *, packed: Callable[[AdapterLike], PackedAdapter] | None = None
    ) -> tuple[Mix, list[int]]:
        """The distinct adapters among `adapters` as a mix, and each entry's member number (BASE for None). packed: how to pack an adapter;
        by default `Base.packed`."""
        distinct = list(dict.fromkeys(a for a in adapters if a is not None))
        number = {a: i for i, a in enumerate(distinct)}
        all_packed = self._packed_now(distinct) if packed is None else [packed(a) for a in distinct]
        order = in_order([p.placed for p in all_packed])
        member = {i: m for m, i in enumerate(order)}
        return Mix([all_packed[i] for i in order]), [BASE if a is None else member[number[a]] for a in adapters]

    def packed(self, adapter: AdapterLike) -> PackedAdapter:
        """The adapter packed for inference. The result is kept as long as the adapter lives. It is packed again after a write to its
        tensors or to the base's (as far as `derived` sees it). For prompt tuning, keys and values are computed here, once."""
        return self._packed_now([adapter])[0]

    def _packed_now(self, adapters: Sequence[AdapterLike]) -> list[PackedAdapter]:
        if not adapters:
            return []
        generation = self.attached.weights.look()
        self._forget_stale(adapters, generation)
        found = []
        for a in adapters:
            if (kept := self._packed.get(a)) is None:
                kept = self._packed[a] = _Kept(self.pack(a), a.method, Stamp(a.params.values()), generation)
            found.append(kept)
        for a, kept, moved in zip(adapters, found, together([k.packed for k in found]), strict=True):
            if moved is not kept.packed:
                self._packed[a] = replace(kept, packed=moved)
        return [self._packed[a].packed for a in adapters]

    def _forget_stale(self, adapters: Sequence[AdapterLike], generation: int) -> None:
        """Free the packed copies that are of other tensors, or of other weights of the base."""
        kept = [(a, k) for a in adapters if (k := self._packed.get(a)) is not None]
        held = hold([(k.params, list(a.params.values())) for a, k in kept])
        for (a, k), good in zip(kept, held, strict=True):
            if not good or (k.generation, k.method) != (generation, a.method):
                self.forget(a)

    @torch.no_grad()
    def pack(self, adapter: AdapterLike) -> PackedAdapter:
        """The adapter packed for inference, for whoever keeps the result while neither its tensors nor the base's are written to. `packed`
        keeps it, and sees writes."""
        packed = self.attached.pack(adapter.method, dict(adapter.params), adapter.sites).for_inference()
        if packed.prefix is not None and packed.prefix.embeds_NH is not None:
            packed.kv = self._prefix_kv(packed)
        return packed

    def forget(self, adapter: AdapterLike) -> None:
        """Free the packed copy; the next use makes it again."""
        self._packed.pop(adapter, None)

    def batch(self, pieces: Sequence[Piece], mix: Mix, **options: Any) -> Batch:
        """`make_batch` on this base's device, with its limit of positions."""
        return make_batch(pieces, mix, device=self.device, max_positions=self.spec.max_positions, **options)

    def logits(
        self, sequences: Sequence[Sequence[int]], adapters: Sequence[AdapterLike | None] | None = None, *, grad: bool = False
    ) -> list[Tensor]:
        """Logits [t, V] of each sequence of token ids under its adapter (None: the base), in one mixed forward. grad: keep the graph to the
        adapters' tensors."""
        adapters = list(adapters) if adapters is not None else [None] * len(sequences)
        self._check(sequences, adapters)
        with torch.set_grad_enabled(grad):
            mix, members = self.mix(adapters, packed=self._pack_with_grad if grad else None)
            pieces = [Piece(torch.as_tensor(ids, dtype=torch.int64), member) for ids, member in zip(sequences, members, strict=True)]
            batch = self.batch(pieces, mix)
            hidden_TH = self.attached.forward(batch)
            logits_TV = self.attached.head(hidden_TH, batch, range(batch.total))
        return [logits_TV[a:b] for a, b in batch.where]

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]], adapters: Sequence[AdapterLike]) -> list[Tensor]:
        """What each sequence's adapter says of it by its own head: [K], fp32, read at the last token, as transformers does for sequences
        without padding; in one mixed forward. Of a head that reads every token, [t, K]. TrimtabError where an adapter has no head."""
        self._check(sequences, adapters)
        mix, members = self.mix(adapters)
        pieces = [Piece(torch.as_tensor(ids, dtype=torch.int64), member) for ids, member in zip(sequences, members, strict=True)]
        batch = self.batch(pieces, mix)
        every = [(head := getattr(a, "head", None)) is not None and head.every_token for a in adapters]
        rows = [range(a if all_rows else b - 1, b) for (a, b), all_rows in zip(batch.where, every, strict=True)]
        flat = [(r, member) for own, member in zip(rows, members, strict=True) for r in own]
        found = head_scores(self.attached, self.attached.forward(batch), batch, *zip(*flat, strict=True))
        split = iter(found)
        return [torch.stack([next(split) for _ in own]) if all_rows else next(split) for own, all_rows in zip(rows, every, strict=True)]

    def _pack_with_grad(self, adapter: AdapterLike) -> PackedAdapter:
        return self.attached.pack(adapter.method, dict(adapter.params), adapter.sites)

    def _check(self, sequences: Sequence[Sequence[int]], adapters: Sequence[AdapterLike | None] | Sequence[AdapterLike]) -> None:
        if len(adapters) != len(sequences):
            raise TrimtabError(
                f"{len(sequences)} sequences but {len(adapters)} adapters", fix="give one adapter (or None) for each sequence"
            )
        if not sequences:
            raise TrimtabError("no sequences were given")
        problems = [f"sequence {i} is empty" for i, ids in enumerate(sequences) if len(ids) == 0]
        problems += [
            f"sequence {i} has token ids outside 0..{self.spec.vocab_size - 1}"
            for i, ids in enumerate(sequences)
            if len(ids) and not 0 <= int(min(ids)) <= int(max(ids)) < self.spec.vocab_size
        ]
        if problems:
            raise TrimtabError("these sequences cannot be run", problems=problems)

    # ---- generation ----

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        adapters: Sequence[AdapterLike | None] | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Continue prompts, each under its adapter, in one mixed batch; returns the new texts. A string is a user turn, rendered with the
        chat template if the base has one. A list of ids is taken as it is. temperature 0 is greedy. on_token(i, id) is called as tokens
        appear."""
        ids = [self.encode_prompt(p) if isinstance(p, str) else list(p) for p in prompts]
        new = self.generate_ids(ids, adapters, Sampling(max_new_tokens, temperature, top_p, top_k, seed, min_p), on_token)
        return [self.tokenizer.decode(n, skip_special_tokens=True) for n in new]

    def generate_ids(
        self,
        sequences: Sequence[Sequence[int]],
        adapters: Sequence[AdapterLike | None] | None = None,
        sampling: Sampling | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """New token ids for each sequence (without the stop token)."""
        adapters = list(adapters) if adapters is not None else [None] * len(sequences)
        self._check(sequences, adapters)
        if any(getattr(a, "head", None) is not None for a in adapters):
            raise TrimtabError("an adapter with a head scores texts and gives no answers", fix="use `Base.scores`, or `trimtab score`")
        mix, members = self.mix(adapters)
        return generate(self.attached, mix, members, sequences, sampling or Sampling(), self.stop_ids, on_token)

    def encode_prompt(self, text: str, system: str | None = None) -> list[int]:
        """Token ids of a user's turn, ready for the assistant's; plain ids where the base has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer(text)["input_ids"]
        return self.encode_messages(([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}])

    def encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to the assistant's turn, as in training. What a message spells out is text: none of it becomes a
        control token. DataError if the base has no chat template, or the template refuses the conversation."""
        return encode_prompt([dict(m) for m in messages], self.tokenizer)

    @cached_property
    def stop_ids(self) -> set[int]:
        """Tokens that end an answer: the template's end of turn, the tokenizer's eos, and those of the generation config."""
        config = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids = set(config) if isinstance(config, (list, tuple)) else {config}
        if self.tokenizer is not None:
            ids |= {self.tokenizer.eos_token_id, end_of_turn_id(self.tokenizer)}
        return {i for i in ids if i is not None}

    # ---- what initialisers ask (methods.base.BaseView) ----

    def matrix(self, name: str) -> Weight:
        """The weight of a linear layer or an embedding."""
        return self.attached.weights.of[name]

    def unpacked(self, name: str) -> Tensor:
        """A linear layer's matrix [O, I] as the base's folder has it, where the base was packed while it was loaded: on the CPU, mapped
        from the file. ConfigError where there is none."""
        matrix = self.matrix(name)
        if matrix.stored_dense or self.path is None or quantization_settings(self.path) is not None:
            what = "is not packed" if matrix.stored_dense else "was packed before it was loaded: what that took away is not known"
            raise ConfigError(
                f"init_lora_weights = 'loftq': {name} {what}", fix="load a dense base with quantize: nf4, or take another start"
            )
        if self._source is None:
            from trimtab.bases.text_tower import load_causal

            self._source = load_causal(self.path, dtype="auto")
        return weight_of(self._source.get_submodule(name), name).dense()

    def parameters_of(self, name: str) -> dict[str, Tensor]:
        """fp32 copies, on the CPU, of one module's own parameters. ConfigError if its matrix is stored in a format that cannot train."""
        matrix = self.attached.weights.of.get(name)
        if matrix is not None and not matrix.stored_dense:
            raise ConfigError(
                f"modules_to_save: the weight of {name} is stored as {matrix.name}, and no copy of it can train",
                fix="leave it out of modules_to_save, or load the base unquantised",
            )
        module = self.model.get_submodule(name)
        visited(module)
        return {n: p.detach().float().cpu().clone() for n, p in module.named_parameters(recurse=False)}

    def parameter(self, name: str) -> Tensor:
        """A parameter or buffer of the model as it stands; never to be written to."""
        at, _, own = name.rpartition(".")
        module = self.model.get_submodule(at)
        visited(module)
        found: Tensor = module._parameters[own] if own in module._parameters else module.get_buffer(own)
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. TrimtabError if the tokenizer has tokens that the embedding lacks, and the text needs one."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids:
            self._check([ids], [None])
        return ids

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings [n, H] as the base's own embedding module gives them, fp32 on the CPU."""
        return self.attached.embedding(torch.as_tensor(ids, device=self.device)[None])[0].float().cpu()

    @torch.no_grad()
    def kv(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values [L, n, kv_heads, head_dim] that the base computes for these tokens at positions 0.."""
        return self._capture(self.batch([Piece(torch.as_tensor(ids, dtype=torch.int64))], Mix([])))

    def _prefix_kv(self, packed: PackedAdapter) -> tuple[Tensor, Tensor]:
        one = Piece(torch.zeros(1, dtype=torch.int64), 0)  # a prefix is laid out before a sequence of its member; its rows do not see it
        keys, values = self._capture(self.batch([one], Mix([packed])))
        return keys[:, : packed.virtual_tokens], values[:, : packed.virtual_tokens]

    def _capture(self, batch: Batch) -> tuple[Tensor, Tensor]:
        batch.plan.capture = True
        self.attached.forward(batch)
        keys, values = zip(*batch.plan.captured, strict=True)
        return torch.stack(keys), torch.stack(values)


def load_base(
    name_or_path: str | torch.nn.Module,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
    base_differs: bool = False,
    shards: Shards | None = None,
) -> Base:
    """Load a base and freeze it: a bundled name ("smollm2-135m-instruct"), a folder, a hub id, or a .gguf file.

    It may also be a causal language model of transformers that is loaded already, with its `tokenizer`. It stays as it is, in its dtype and
    on its device, but it is frozen, in eval mode, and cannot be called by itself any more. A model that was given before is the same Base.

    dtype: by default bfloat16 if the hardware multiplies it natively, else float32. device: by default CUDA if there is one. quantize: a
    format in which the linear layers of a dense base are packed while they are read: nf4, fp4, int8, nf4-double or fp4-double.
    base_differs: take adapters that were trained on another base, as on this one in another precision. shards: see `Base.shard`; a rank
    reads its part alone, one layer after the other. BaseError if the base cannot be found, read or supported; the message says what there
    is instead.
    """
    if isinstance(name_or_path, torch.nn.Module):
        if given := [n for n, v in (("dtype", dtype), ("device", device), ("quantize", quantize)) if v is not None]:
            raise ConfigError(f"{', '.join(given)}: of a base that is loaded here, and a model was given", fix="load the model so")
        return _around(name_or_path, tokenizer, base_differs)
    if tokenizer is not None:
        raise ConfigError(f"a tokenizer was given beside {name_or_path!r}, which has its own", fix="give a loaded model, or no tokenizer")
    loaded = bases.load(name_or_path, dtype=dtype, device=device, quantize=quantize, shards=shards)
    return Base(
        loaded.model, loaded.tokenizer, name=loaded.name, path=loaded.path, fingerprint=loaded.fingerprint, base_differs=base_differs
    )


IN_MEMORY = "a model in memory"
"""What a base is called that came as a model without a name."""
KNOWN_AS = "_trimtab_base"
"""The attribute in which a model that was given keeps its Base, so that both go together."""


def _around(model: Any, tokenizer: Any, base_differs: bool) -> Base:
    """The Base of a model that is loaded already. It has a path only where a folder holds the very tensors: merging reads them there."""
    known: Base | None = vars(model).get(KNOWN_AS)
    if known is not None:
        if tokenizer is not None and tokenizer is not known.tokenizer:
            raise ConfigError("this model is a base already, with another tokenizer", fix="give the same tokenizer, or load the model anew")
        known.base_differs = base_differs or known.base_differs
        return known
    if hasattr(model, "peft_config"):
        raise ConfigError("the model has adapters of peft", fix="give the model without them: `peft_model.unload()`")
    if tokenizer is None or not hasattr(model, "config"):
        what = "its tokenizer is missing" if hasattr(model, "config") else f"a {type(model).__name__} is no model of transformers"
        raise ConfigError(f"the base is a loaded model, and {what}", fix="give model and tokenizer: base=model, tokenizer=tokenizer")
    name, fingerprint = str(getattr(model, "name_or_path", "") or IN_MEMORY), bases.fingerprint_model(model)
    folder = Path(name)
    same = folder.is_dir() and bases.fingerprint_folder(folder) == fingerprint
    base = Base(model, tokenizer, name=name, path=folder if same else None, fingerprint=fingerprint, base_differs=base_differs)
    vars(model)[KNOWN_AS] = base
    return base
