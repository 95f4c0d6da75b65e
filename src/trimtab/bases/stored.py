"""Bases whose linear layers are packed: read as folders have them, or quantised while they are read.

transformers builds the model and reads what is dense. Where a layer will be packed, it finds a place without a matrix (`_Waiting`), so no
dense matrix is ever made there. The packed tensors are mapped from the files; a matrix that is quantised is read, packed and let go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from trimtab.bases.folder import read_header, weight_files
from trimtab.bases.pieces import Names, Pieces, put_together
from trimtab.bases.shared_load import ByLayer
from trimtab.bases.stored_formats import STORED, method_of
from trimtab.bases.weights.experts import parameters_of_experts, put_dense, put_experts
from trimtab.bases.weights.packed import KINDS, PackedLinear
from trimtab.errors import BaseError, first_of
from trimtab.memory import release_files, release_freed, release_mapped

_DENSE = ("BF16", "F16", "F32", "F64")
"""safetensors' names of dtypes in which matrices are stored as they are."""
_OF_INPUTS = ("input_scale", "input_scale_ub", "activation_scale")
"""How inputs are to be rounded, which is not done. Where calibration saw no token, as in an expert that got none, they may be NaN."""


class Packing:
    """Of one load: which layers are packed, and from what. settings: the folder's `quantization_config`; quantize: a format of
    `recipes.BITS`; at most one of both. renamed: what the model calls a name of the files. experts: whether these are quantised too.
    by_layer: shares out what is read."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        settings: Mapping[str, Any] | None,
        quantize: str | None,
        renamed: Mapping[str, str],
        experts: bool = True,
        by_layer: ByLayer | None = None,
    ):
        self._with_experts, self._by_layer = experts, by_layer
        self._made: dict[str, PackedLinear] = {}
        self._routers: dict[str, tuple[int, int]] = {}
        self.folder, self.dtype, self.settings, self.quantize = folder, dtype, settings, quantize
        self.stored = None if settings is None else STORED[method_of(settings)]
        self._renamed = renamed
        self._tensors = {t.name: t for file in weight_files(folder) for t in read_header(file)}

    def prepare(self, model: Any) -> None:
        """Put places without matrices where layers will be packed."""
        if self._by_layer is not None:
            self._by_layer.prepare(model)
        self._names = {self._named(name, model): name for name in self._tensors}
        experts = parameters_of_experts(model)
        self._find_modules(model, set(experts))
        self._experts = list(experts)
        self._quantized = set(experts) if self.quantize is not None and self._with_experts else set[str]()
        for name in list(self._chosen(model, set(experts))):
            if name in experts:
                module, own = experts[name]
                put_experts(module, own, _Waiting.for_experts(module, own))
            elif name in self._routers:
                self._routers[name] = tuple(model.get_parameter(f"{name}.weight").shape)
                put_dense(model.get_submodule(name), "weight", None)
            else:
                model.set_submodule(name, _Waiting.of(model.get_submodule(name)))

    def _find_modules(self, model: Any, experts: set[str]) -> None:
        """Sort the files' tensors by module, and find what the model calls those that are packed."""
        self._own: dict[str, dict[str, str]] = {}
        self._pieces: dict[str, Pieces] = {}
        if self.stored is None or self.stored.experts:
            return
        names = Names(model, dict(self._renamed))
        marked = {n.removesuffix(mark) for n in self._tensors for mark in self.stored.marks if n.endswith(mark)}
        dense = {n.removesuffix(".weight") for n in self._tensors if n.endswith(".weight")}
        for name in self._tensors:
            if (module := next((m for m in _above(name) if m in marked or m in dense), None)) is not None:
                self._own.setdefault(module, {})[name.removeprefix(f"{module}.")] = name
        pieces = names.pieces(marked | dense, experts)
        self._pieces = {n: p for n, p in pieces.items() if not marked.isdisjoint(p.modules)}
        one_by_one = {at for p in self._pieces.values() for at in p.modules}
        self._marked = {names.module(n): n for n in marked - one_by_one}
        self._marked_pieces = marked & one_by_one

    def packs(self, parameter: str) -> bool:
        """Whether this parameter of experts is quantised once transformers has read it."""
        return parameter in self._quantized

    def get_ops(self) -> ConversionOps:
        return _PackExperts(self)

    def pack(self, model: Any, parameter: str, dense: Tensor) -> None:
        """Quantise a parameter of experts, [E, O, I] or [E, I, O]. It gets its place in `fill`: before that transformers would take what is
        computed of stored tensors for tensors that are missing."""
        assert self.quantize is not None
        at, _, name = parameter.rpartition(".")
        module = model.get_submodule(at)
        rows = (dense.transpose(1, 2) if module.is_transposed else dense).flatten(0, 1)
        put_experts(module, name, _Waiting.for_experts(module, name))
        self._made[parameter] = made = KINDS[self.quantize].of_matrix(rows.to(self.dtype), None, self.dtype)
        if self._by_layer is not None:  # in `fill` it would be too late: all layers' experts are read before
            self._by_layer.share(parameter, made)
        release_files(weight_files(self.folder))  # what was put together stays mapped
        release_freed()  # several times the parameter, which lies between what is kept

    def fill(self, model: Any) -> None:
        """Put packed layers into the places. BaseError, with all that is wrong, where what is stored cannot be read."""
        problems: list[str] = []
        with ExitStack() as stack:
            files = sorted({t.file for t in self._tensors.values()})
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}

            def tensor(name: str) -> Tensor:
                found: Tensor = opened[self._tensors[name].file].get_tensor(name)
                return found

            for name, module in list(model.named_modules()):
                if not isinstance(module, _Waiting):
                    continue
                try:
                    if (pieces := self._pieces.get(name)) is not None:
                        self._put_together(model, name, module, pieces, tensor)
                    else:
                        packed = self._made.pop(name) if name in self._made else self._packed(name, module, tensor)
                        packed.experts = module.experts
                        model.set_submodule(name, packed)
                    if self._by_layer is not None:
                        self._by_layer.reached(name)
                except ValueError as error:
                    problems.append(f"{name}: {error}")
            for name, shape in self._routers.items():
                try:
                    layer = self._read(self._own[self._marked[name]], shape, None, tensor)
                    put_dense(model.get_submodule(name), "weight", KINDS[layer.form](layer).dense())
                except ValueError as error:
                    problems.append(f"{name}: {error}")
        if self.quantize is not None or self._pieces:
            release_freed()
        for name in self._experts:  # in the order of the class's parameters, which is in the names of peft's files
            at, _, own = name.rpartition(".")
            module = model.get_submodule(at)
            for parts in [module._modules, *([module._parameters] if name in self._pieces else [])]:
                if own in parts:
                    parts[own] = parts.pop(own)
        if problems:
            raise BaseError(
                f"packed weights of the base in {self.folder} cannot be read",
                problems=first_of(problems, 10),
                fix="fetch the folder anew, or check that config.json belongs to these weights.",
            )

    def _packed(self, name: str, waiting: _Waiting, tensor: Callable[[str], Tensor]) -> PackedLinear:
        shape = waiting.out_features, waiting.in_features
        if self.stored is None:
            weight = tensor(self._names[f"{name}.weight"])
            if tuple(weight.shape) != shape:
                file = self._tensors[self._names[f"{name}.weight"]].file.name
                raise ValueError(f"weight is {list(weight.shape)} where {list(shape)} belongs ({file})")
            assert self.quantize is not None
            made = KINDS[self.quantize].of_matrix(weight.to(self.dtype), waiting.bias, self.dtype)
            release_mapped(weight.data_ptr(), weight.nbytes)
            return made
        if self.stored.experts:
            own = {n.removeprefix(f"{name}_"): stored for n, stored in self._names.items() if n.startswith(f"{name}_")}
            own.pop("bias", None)  # experts' biases are parameters of their own
        else:
            own = self._own[self._marked[name]]
        return self._read(own, shape, waiting.bias, tensor, waiting.experts)

    def _read(
        self, own: Mapping[str, str], shape: tuple[int, int], bias: Tensor | None, tensor: Callable[[str], Tensor], experts: int = 0
    ) -> PackedLinear:
        """A packed layer. own: its tensors' names after the module's -> in the files. ValueError, with the file, where they do not fit."""
        assert self.stored is not None and self.settings is not None
        try:
            if bias is None and "bias" in own and bool(tensor(own["bias"]).any()):  # GPTQ's programs write one of zeros everywhere
                raise ValueError("bias is not zero, and the model has no place for it")
            tensors = {n: tensor(s) for n, s in own.items() if n != "bias"}
            layer = self.stored.read(tensors, shape, bias, self.dtype, {**self.settings, "experts": experts})
            if wild := [f"{n} has {lost:,} numbers that are not finite" for n, t in tensors.items() if (lost := _not_finite(n, t))]:
                raise ValueError("; ".join(wild))
            return layer
        except ValueError as error:
            raise ValueError(f"{error} ({self._files(own, str(error))})") from error

    def _files(self, own: Mapping[str, str], said: str) -> str:
        """The files of a layer's tensors, or of those that a text names. own: names after the module's -> in the files."""
        named = [s for n, s in own.items() if re.search(rf"(?<![\w.]){re.escape(n)}(?![\w.])", said)]
        return ", ".join(sorted({self._tensors[s].file.name for s in named or own.values()}))

    def _put_together(self, model: Any, name: str, waiting: _Waiting, pieces: Pieces, tensor: Callable[[str], Tensor]) -> None:
        def read(at: str, shape: tuple[int, int]) -> PackedLinear | Tensor:
            own = self._own[at]
            try:
                if at in self._marked_pieces:
                    return self._read(own, shape, None, tensor)
                if tuple((weight := tensor(own["weight"])).shape) != shape:
                    raise ValueError(f"weight is {list(weight.shape)} where {list(shape)} belongs ({self._files(own, 'weight')})")
            except ValueError as error:
                raise ValueError(f"{at}: {error}") from error
            return weight.to(self.dtype)

        at, _, parameter = name.rpartition(".")
        sides = waiting.experts, waiting.out_features // waiting.experts, waiting.in_features
        put_together(model.get_submodule(at), parameter, sides, pieces, read)
        release_files(weight_files(self.folder))

    def _chosen(self, model: Any, experts: set[str]) -> Iterable[str]:
        """The linear layers, or parameters of experts, that the files have packed; or the linear layers of the decoder layers, but for
        routers, where they are quantised here."""
        head = model.get_output_embeddings()
        if self.stored is not None:
            if self.stored.experts:
                marked, linear = {n.removesuffix(mark) for n in self._names for mark in self.stored.marks if n.endswith(mark)}, experts
            else:
                marked, linear = set(self._marked), {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
                self._routers = dict.fromkeys(_routers(model, marked - linear), (0, 0))
                linear |= self._routers.keys()
            if strange := sorted(marked - linear):
                raise BaseError(
                    f"the base in {self.folder} has packed weights where its model has no linear layer: {', '.join(strange[:5])}",
                    fix="use a base whose linear layers alone are quantised, or the dense one with `quantize: nf4`",
                )
            self._refuse_bare(model, marked)
            return sorted([*marked, *self._pieces])
        routers = {f"{n}.{c}" for n, m in model.named_modules() if hasattr(m, "experts") for c, _ in m.named_children()}
        for block, count in {n.rsplit(".", 2)[0]: len(model.get_parameter(n)) for n in experts}.items():  # some lie deeper
            inside = model.get_submodule(block).named_modules(prefix=block)
            sides = count, model.config.hidden_size
            routers |= {n for n, m in inside if isinstance(m, nn.Linear) and (m.out_features, m.in_features) == sides}
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head and n not in routers]
        return [n for n, m in found if re.search(r"\.\d+\.", n) and f"{n}.weight" in self._names]

    def _refuse_bare(self, model: Any, marked: set[str]) -> None:
        """BaseError where a parameter outside the packed layers is stored in 8 bits: transformers would take these codes for the matrix."""
        stored = {n: self._tensors[self._names[n]].dtype for n, _ in model.named_parameters() if n in self._names}
        bare = [
            f"{n} is {dtype} ({self._tensors[self._names[n]].file.name})"
            for n, dtype in stored.items()
            if dtype not in _DENSE and n.rpartition(".")[0] not in marked
        ]
        if bare:
            raise BaseError(
                f"the base in {self.folder} has packed weights without the tensors that tell what they mean",
                problems=first_of(bare, 10),
                fix="fetch the folder anew; where scales are of a kind that trimtab does not read, use the dense base with `quantize: nf4`",
            )

    def _named(self, name: str, model: Any) -> str:
        """What the model calls a tensor of the files."""
        for pattern, put in self._renamed.items():
            if re.search(pattern, name):
                return re.sub(pattern, put, name)
        prefix = model.base_model_prefix
        inside = hasattr(model, prefix) and not hasattr(model, name.split(".")[0])
        return f"{prefix}.{name}" if inside else name


def _not_finite(name: str, tensor: Tensor) -> int:
    """How many scales, or other numbers beside the codes, are NaN or infinite. bitsandbytes may keep codes as floating-point numbers."""
    if name == "weight" or name in _OF_INPUTS or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return 0
    return tensor.numel() - int(tensor.isfinite().sum())


def _routers(model: Any, names: set[str]) -> set[str]:
    """Those of these modules that choose experts, by a matrix of their own: they become dense."""
    blocks = {n.rsplit(".", 2)[0]: len(model.get_parameter(n)) for n in parameters_of_experts(model)}
    shapes = {n: dict(model.get_submodule(n).named_parameters(recurse=False)) for n in names if _is_there(model, n)}
    widths = {n: p["weight"].shape for n, p in shapes.items() if "weight" in p and p["weight"].dim() == 2}
    return {n for n, (rows, _) in widths.items() if blocks.get(n.rpartition(".")[0]) == rows}


def _is_there(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _above(name: str) -> Iterator[str]:
    """The modules that a tensor may be of by its name, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


class _Waiting(nn.Module):
    """A linear layer whose matrix is still to come, or the matrices of some experts, one below the other."""

    def __init__(self, outputs: int, inputs: int, bias: nn.Parameter | None, experts: int):
        super().__init__()
        self.in_features, self.out_features, self.bias, self.experts = inputs, outputs, bias, experts

    @classmethod
    def of(cls, linear: Any) -> _Waiting:
        return cls(linear.out_features, linear.in_features, linear.bias, 0)

    @classmethod
    def for_experts(cls, module: Any, name: str) -> _Waiting:
        experts, *sides = module.get_parameter(name).shape
        outputs, inputs = reversed(sides) if module.is_transposed else sides
        return cls(experts * outputs, inputs, None, experts)


class _PackExperts(ConversionOps):
    """What transformers does with a parameter of experts that it has read, and put together of files for each expert."""

    def __init__(self, packing: Packing):
        self.packing = packing

    def convert(
        self, input_dict: dict[str, Any], *, model: Any = None, full_layer_name: str = "", missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        (found,) = input_dict.values()
        self.packing.pack(model, full_layer_name, found[0] if isinstance(found, list) else found)
        missing_keys.discard(full_layer_name)
        return {}
