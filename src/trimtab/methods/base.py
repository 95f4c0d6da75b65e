"""The contract of a PEFT method: a frozen dataclass of hyperparameters and pure functions on dicts of tensors.

Read this file first. A method says where it acts (`sites`), what tensors an adapter has there (`Site.shapes`, under the names of `peft`'s
files), how they are initialised (`init`), and how the mixed forward uses them (`pack`). There are two kinds of methods:

- An *edit* changes what one module of the base computes, row by row. `pack` returns a `Packed`: a kernel of `trimtab.ops` and its tensors.
  Edits of several adapters that share a kernel run together on one flat batch. A kernel sees spans of rows, never a rank or an alpha.
- A *prefix* puts keys and values before token 0. `prefix` returns them, or embeddings from which the base computes them.

A class that sets `peft_type` is registered. The method can then be trained, alone or with others, saved, served in mixed batches and used
on the command line, and the laws run over it.

Dimensions: T rows of a flat batch, I input features, O output features, r rank, N virtual tokens, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from trimtab.bases.spec import Spec
from trimtab.errors import NotMergeable
from trimtab.hyperparameters import Hyperparameters

if TYPE_CHECKING:  # run files and stores are read without torch, so methods import it where they compute
    import torch
    from torch import Tensor

    from trimtab.bases.weights import Weight
    from trimtab.ops.grouped import Factors, GroupedRows

Params = Mapping[str, "Tensor"]
"""Tensors of one adapter at one site, keyed as in `Site.shapes`."""


@dataclass(frozen=True)
class Site:
    """Where a method acts in the base: a module, or the input of the whole model.

    name: the module's path in the base ("" for prefixes). shapes: the adapter's tensors here, named as peft names them after the module.
    rank and scaling: LoRA's, which patterns may set for each module. saved: a whole module trained in full (`modules_to_save`), in the
    shapes in which the base keeps it. transposed: whether those are (in, out), as GPT-2's are.
    experts: how many experts a parameter of experts holds; 0 at modules. stored: what stands before the tensors' names in files, where that
    is not the site's name. router: whether it is a router of experts, of which an edit replaces the parameters. by_weight: whether
    `target_parameters` names it, by its weight. fixed: tensors that do not train; they are computed away when an adapter is saved.
    head: an adapter's own head (`head.py`), which is no module of the base; such a site is saved too, and no method knows it.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    rank: int = 0
    scaling: float = 1.0
    feedforward: bool = False
    saved: bool = False
    transposed: bool = False
    experts: int = 0
    stored: str = ""
    router: bool = False
    by_weight: bool = False
    fixed: tuple[str, ...] = ()
    head: bool = False

    @property
    def named(self) -> str:
        """What rank_pattern and alpha_pattern call it, as peft does."""
        return self.name + ROUTER_WEIGHT * self.by_weight

    def key(self, tensor: str) -> str:
        """The tensor's name within an adapter: the peft file's key without its "base_model.model." prefix."""
        return f"{self.stored or self.name}.{tensor}" if self.name else tensor


@dataclass(frozen=True)
class Span:
    """Rows start..stop of a flat batch that use the same adapter. slot: the adapter's index in the packs beside it."""

    start: int
    stop: int
    slot: int


ROUTER_WEIGHT = ".weight"
"""What peft's target_parameters have behind a router's name."""
SHORT_SPAN = 64
"""Spans of at most so many rows run row by row in native kernels; longer ones are worth a matmul of their own."""


@dataclass(frozen=True)
class Rows:
    """Which rows an edit touches: disjoint spans in ascending order. total: all rows of the batch, touched or not. keys_T: of their
    dropout (`ops.dropout`), in training."""

    spans: tuple[Span, ...]
    total: int
    device: torch.device
    keys_T: Tensor | None = None
    _of_slots: dict[tuple[int, ...], GroupedRows] = field(default_factory=dict, compare=False)
    _touched: dict[tuple[int, ...] | None, tuple[Tensor | slice, Tensor]] = field(default_factory=dict, compare=False)

    def keys(self, span: Span) -> Tensor | None:
        return None if self.keys_T is None else self.keys_T[span.start : span.stop]

    def of_slots(self, slots: tuple[int, ...]) -> GroupedRows:
        """The rows of these slots, for products grouped by slot."""
        if slots not in self._of_slots:
            from trimtab.ops import grouped_rows

            self._of_slots[slots] = grouped_rows(self.spans, slots, self.device)
        return self._of_slots[slots]

    def touched(self, places: tuple[int, ...] | None = None) -> tuple[Tensor | slice, Tensor]:
        """(rows touched, slot of each) for gathered kernels; a slice where the spans leave no gap, so that nothing is copied. places: a
        number for each slot in place of its own; rows of a slot whose number is -1 are left out."""
        if places not in self._touched:
            self._touched[places] = self._find_touched(places)
        return self._touched[places]

    def _find_touched(self, places: tuple[int, ...] | None) -> tuple[Tensor | slice, Tensor]:
        import numpy as np

        from trimtab.ops import upload

        spans = [s for s in self.spans if places is None or places[s.slot] >= 0]
        slots = np.repeat([s.slot if places is None else places[s.slot] for s in spans], [s.stop - s.start for s in spans])
        first, last = spans[0].start, spans[-1].stop
        if last - first == len(slots):
            return slice(first, last), upload([slots], self.device)[0]
        index, slot_R = upload([np.concatenate([np.arange(s.start, s.stop) for s in spans]), slots], self.device)
        return index, slot_R

    @cached_property
    def slot_T(self) -> Tensor:
        """The slot of every row of the batch, int32, -1 for rows of no span."""
        import numpy as np
        import torch

        slots = np.full(self.total, -1, dtype=np.int32)
        for s in self.spans:
            slots[s.start : s.stop] = s.slot
        return torch.from_numpy(slots)

    @cached_property
    def by_row(self) -> tuple[Tensor | None, tuple[Span, ...]]:
        """(slot of every row of the batch, int32, -1 for rows of no short span; None without one, the spans longer than SHORT_SPAN)."""
        import numpy as np
        import torch

        short = [s for s in self.spans if s.stop - s.start <= SHORT_SPAN]
        long = tuple(s for s in self.spans if s.stop - s.start > SHORT_SPAN)
        if not short:
            return None, long
        slots = np.full(self.total, -1, dtype=np.int32)
        for s in short:
            slots[s.start : s.stop] = s.slot
        return torch.from_numpy(slots), long


@dataclass(frozen=True)
class Packed:
    """An edit ready to run at one site. Tensors are in the dtype that the kernel wants. They may be padded with zeros to other adapters'
    sizes: for tensors of zeros a kernel computes the base's result."""

    kernel: Kernel
    tensors: Mapping[str, Tensor]
    dropout: float = 0.0
    factors: Factors | None = None
    """What `lora_grouped` trains, in place of tensors: a mix casts and stacks those of all its sites together."""


class Around(Protocol):
    """The base's module as an edit sees it: call it for all rows, multiply by its matrix, read its bias, call it with other parameters.
    matrix: None if the module has none. plain: calling it runs the frozen module alone, no other edit before it."""

    matrix: Weight | None
    bias_O: Tensor | None
    row_scale: Tensor | float
    site: int
    plain: bool

    def __call__(self, x_TI: Tensor) -> Tensor: ...
    def with_parameters(self, parameters: Mapping[str, Tensor], x_TI: Tensor) -> Tensor: ...


class Packs(Protocol):
    """The packed edits of the adapters of one batch at one site; all share a kernel. `gathered`: for kernels that gather, parts of them as
    (name -> one tensor for several slots, padded to a common shape; the rows of the batch; where each of these has its own there).
    `in_groups`: LoRA's factors for products grouped by adapter, and which slot each group is."""

    items: Sequence[Packed]
    tables: Sequence[Any]

    def gathered(self, rows: Rows) -> Iterator[tuple[Callable[[str], Tensor], slice | Tensor, Tensor]]: ...
    @property
    def in_groups(self) -> list[tuple[Tensor, Tensor, tuple[int, ...]]] | None: ...
    @property
    def lora_parts(self) -> Any: ...


class Kernel(Protocol):
    """Runs the edits of one kind at one site. base: an Around; packs: a Packs; rows: a Rows. It changes the rows of its spans only."""

    def __call__(self, x: Tensor, /, base: Any, packs: Any, rows: Any) -> Tensor: ...


@dataclass(frozen=True)
class Prefix:
    """What is before token 0. Either `kv_LNHD`: (keys, values) of every layer as stored, each [L, N, kv_heads, head_dim], keys not rotated;
    or `embeds_NH`: N input embeddings from which the base computes keys and values at positions 0..N-1."""

    length: int
    kv_LNHD: tuple[Tensor, Tensor] | None = None
    embeds_NH: Tensor | None = None


class BaseView(Protocol):
    """What an initialiser may ask of a base: shapes, weights, token ids, embeddings, and the keys and values of a text."""

    @property
    def spec(self) -> Spec: ...
    def matrix(self, name: str) -> Weight: ...
    def unpacked(self, name: str) -> Tensor: ...
    def parameters_of(self, name: str) -> dict[str, Tensor]: ...
    def encode(self, text: str) -> list[int]: ...
    def embed(self, ids: Sequence[int]) -> Tensor: ...
    def kv(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]: ...


METHODS: dict[str, type[Method]] = {}
"""peft_type -> class, filled when the classes are defined: the methods that can be in a mixed batch."""
BY_NAME: dict[str, type[Method]] = {}
"""name in run files and on the command line -> class. `full` is here and not in METHODS, since it cannot be in a mixed batch."""


@dataclass(frozen=True, kw_only=True)
class Method(Hyperparameters):
    """Base of all methods. Fields are hyperparameters under peft's names. A wrong type, value or name raises a ConfigError that lists every
    finding."""

    peft_type: ClassVar[str] = ""
    preset_lr: ClassVar[float] = 1e-3
    """The learning rate where a variant names none: one that reaches good results on small models."""
    mergeable: ClassVar[bool] = True
    in_peft: ClassVar[bool] = False
    """Whether peft has this method: then `store` spells out peft's keys for it; else adapter_config.json holds the fields as they are."""

    def __init_subclass__(cls) -> None:
        if "peft_type" in cls.__dict__:
            METHODS[cls.peft_type] = cls
        if "name" in cls.__dict__:
            BY_NAME[cls.name] = cls

    @classmethod
    def examples(cls) -> list[Method]:
        """Small configurations, one for each option that changes the mathematics. The laws run over these."""
        raise NotImplementedError

    @property
    def invocation(self) -> tuple[int, ...]:
        """aLoRA: the token ids that switch the adapter on. Rows before the last such run of a sequence are the base's; so are all where it
        has none. () is on everywhere."""
        return ()

    @property
    def fresh_is_base(self) -> bool:
        """Whether a newly initialised adapter computes exactly what the base computes."""
        return True

    def sites(self, spec: Spec) -> list[Site]:
        """Where this method acts in a base. ConfigError if a target name matches nothing or cannot be targeted."""
        raise NotImplementedError

    def sites_to_train(self, spec: Spec) -> list[Site]:
        """`sites`, for a new adapter. ConfigError too for settings that make sense only in an adapter that was trained elsewhere."""
        return self.sites(spec)

    def init(self, site: Site, base: BaseView, generator: torch.Generator) -> dict[str, Tensor]:
        """One adapter's tensors at one site, fp32, on the CPU, in the shapes of `site.shapes`."""
        raise NotImplementedError

    def pack(self, site: Site, params: Params, dtype: torch.dtype, matrix: Weight | None) -> Packed:
        """Differentiable: fold scaling in, cast to the dtype that the site computes in. matrix: the base's there, None at a module without
        one (a norm, an MLP)."""
        raise NotImplementedError

    def prefix(self, spec: Spec, params: Params, dtype: torch.dtype) -> Prefix | None:
        """Differentiable. Prefix methods return what is before token 0; edits return None."""
        return None

    def export(self, params: Mapping[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        """The method and the tensors that are saved and served. What only helps training (a prefix's MLP) is computed away."""
        return self, dict(params)

    def merge(self, site: Site, weight_OI: Tensor, bias_O: Tensor | None, params: Params) -> tuple[Tensor, Tensor | None]:
        """New weight and bias, fp32, that compute base and adapter in one matmul. The given ones are not changed. Raises NotMergeable if
        there are none."""
        raise NotMergeable(f"{self.name} adapters cannot be merged into the base")

    def of_rows(self, site: Site, params: Params, rows: slice) -> Params | None:
        """The tensors with which `merge` gives these rows of the new weight from the same rows of the old one. None where a row depends on
        others, or where the method changes a bias."""
        return None


@dataclass(frozen=True, kw_only=True)
class TargetedMethod(Method):
    """A method that acts on modules chosen by name, the way peft chooses them.

    target_modules: a string is a regular expression that must match the whole name ("all-linear": every linear but the output head);
    each name of a list matches exactly or as the last dotted part. None: the family's default. exclude_modules: likewise, taken away.
    modules_to_save: modules trained in full, as their own copy.
    """

    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = field(default=None)
