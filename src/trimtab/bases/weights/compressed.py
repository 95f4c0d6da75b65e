"""What compressed-tensors (llm-compressor) writes: whole numbers of 4 and 8 bits packed in int32, and matrices of int8 or float8.

pack-quantized   W = (code − zero) · weight_scale; codes and zeros are stored from 0 on, from the lowest bits of an int32, codes along the
                 inputs and zeros along the outputs; older files have zeros as int8, unpacked
int-quantized    W = (weight − weight_zero_point) · weight_scale, int8
float-quantized  W = weight · weight_scale, float8_e4m3fn

`weight_scale` is one number, or one for each output, group of inputs, or block.
Inputs that are to be rounded too (W8A8) are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.bases.weights.int4 import IN_ORDER, Grouped, consecutive, is_size, pack, unpack
from trimtab.bases.weights.packed import Packed, PackedLinear, expect, in_one, rows_of, scales_in_one
from trimtab.errors import BaseError

FORMATS_READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_BESIDE = ("weight_shape", "input_scale", "input_zero_point", "input_scale_ub")
"""Tensors that say nothing of W beyond its shape, which is known, and how inputs are rounded."""


class PackQuantized(Grouped):
    """Buffers beside those of `Grouped`: `weight_shape` where the files have it. zeros_stored: how the files
    have zeros ("packed", "int8"; "" where all are the middle code)."""

    name: ClassVar[str] = "pack-quantized-4"
    kind: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4

    def _in_files(self, code_OI: Tensor, zero_OG: Tensor, scale_OG: Tensor) -> dict[str, Tensor]:
        module, found = self.module, {"weight_packed": pack(code_OI, IN_ORDER, self.bits), "weight_scale": scale_OG.contiguous()}
        zeros = getattr(module, "zeros_stored", "packed")
        if zeros == "packed":
            found["weight_zero_point"] = pack(zero_OG.T, IN_ORDER, self.bits).T.contiguous()
        elif zeros == "int8":
            found["weight_zero_point"] = (zero_OG.to(torch.int16) - 2 ** (self.bits - 1)).to(torch.int8)
        if "g_idx" in module._buffers:
            found["weight_g_idx"] = module.get_buffer("g_idx")
        return found | {name: module.get_buffer(name) for name in _BESIDE if name in module._buffers}


class PackQuantized8(PackQuantized):
    name: ClassVar[str] = "pack-quantized-8"
    kind: ClassVar[str] = "int8_groups"
    bits: ClassVar[int] = 8


class IntQuantized(Packed):
    """Buffers: the files' tensors; `scale` and `zero` as kernels read them."""

    name: ClassVar[str] = "int-quantized"
    kind: ClassVar[str] = "int8_groups"

    @classmethod
    def of_matrix(cls, weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        scale = weight_OI.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        codes = (weight_OI.float() / scale).round().to(torch.int8)
        return read({"weight": codes, "weight_scale": scale}, _sides(weight_OI), bias, dtype, _settings("int", 8, "channel"))

    @classmethod
    def below_each_other(cls, layers: Sequence[PackedLinear]) -> PackedLinear | None:
        stored, derived = in_one(layers, "weight"), in_one(layers, "scale", "zero")
        stored |= {"weight_scale": derived["scale"], "weight_zero_point": derived["zero"]}
        return PackedLinear(cls.name, rows_of(layers), layers[0].compute_dtype, stored, None, block=layers[0].block, derived=derived)

    @classmethod
    def parts(cls, module: PackedLinear) -> dict[str, Tensor]:
        return {"codes": module.get_buffer("weight"), "scale": module.get_buffer("scale"), "zero": module.get_buffer("zero")}


class FloatQuantized(Packed):
    """Buffers: the files' tensors; `scale` as kernels read it."""

    name: ClassVar[str] = "float-quantized"
    kind: ClassVar[str] = "fp8"

    @classmethod
    def of_matrix(cls, weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        scale = weight_OI.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / torch.finfo(torch.float8_e4m3fn).max
        codes = (weight_OI.float() / scale).to(torch.float8_e4m3fn)
        return read({"weight": codes, "weight_scale": scale}, _sides(weight_OI), bias, dtype, _settings("float", 8, "channel"))

    @classmethod
    def below_each_other(cls, layers: Sequence[PackedLinear]) -> PackedLinear | None:
        (scale, rows), block = scales_in_one(layers, [layer.get_buffer("scale") for layer in layers]), layers[0].block
        stored, shape = in_one(layers, "weight") | {"weight_scale": scale}, rows_of(layers)
        dtype = layers[0].compute_dtype
        return PackedLinear(cls.name, shape, dtype, stored, None, block=block, block_rows=rows, derived={"scale": scale})

    @classmethod
    def parts(cls, module: PackedLinear) -> dict[str, Tensor]:
        return {"codes": module.get_buffer("weight"), "scale": module.get_buffer("scale")}


def check_settings(settings: Mapping[str, Any]) -> None:
    """BaseError where a `quantization_config` of compressed-tensors names something that is not read."""
    beside = {key: settings.get(key) or {} for key in ("sparsity_config", "transform_config")}
    wrong = [f"{key} is no mapping" for key, value in beside.items() if not isinstance(value, Mapping)]
    sparse, rotated = ({} if wrong else beside[key] for key in beside)
    schemes = settings.get("config_groups")
    if not isinstance(schemes, Mapping) or not all(isinstance(s, Mapping) for s in schemes.values()) or not list(_weights(settings)):
        wrong.append("config_groups names no weights that are quantised")
    else:
        forms = [settings.get("format"), *(s.get("format") for s in schemes.values())]
        for form in [form for i, form in enumerate(forms) if form not in forms[:i]]:
            if form is not None and (not isinstance(form, str) or form not in FORMATS_READ):
                wrong.append(f"format {form!r} is not read, only {', '.join(FORMATS_READ)}")
        told = dict.fromkeys(repr(bits) for w in _weights(settings) if type(bits := w.get("num_bits", 8)) is not int or bits not in (4, 8))
        wrong += [f"config_groups has num_bits {bits}, where 4 or 8 belongs" for bits in told]
        sizes = dict.fromkeys(repr(w["group_size"]) for w in _weights(settings) if not is_size(w.get("group_size")))
        wrong += [f"config_groups has group_size {size}, where -1 or a whole number above 0 belongs" for size in sizes]
    if (form := sparse.get("format", "dense")) != "dense":
        wrong.append(f"sparsity_config has format {form!r}: sparse matrices are not read")
    if rotated.get("config_groups"):
        wrong.append("transform_config rotates what layers read, which is not computed")
    if wrong:
        raise BaseError(
            "the base is quantised by compressed-tensors in a way that trimtab does not read",
            problems=wrong,
            fix="use a base that is quantised in another way, or the dense one with `quantize: nf4`",
        )


def bits_of(settings: Mapping[str, Any]) -> float:
    """The most bits that an entry of a layer takes, with its part of the scales and zeros in memory."""
    found = 8.0
    for i, scheme in enumerate(_weights(settings)):
        bits, size = float(scheme.get("num_bits", 8)), scheme.get("group_size") or 0
        bits += 40 / size if size > 0 else 0
        found = bits if not i else max(found, bits)
    return found


def read(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, settings: Mapping[str, Any]
) -> PackedLinear:
    """A layer as stored. settings: `config_groups`, whose `weights` say bits and sizes of groups: of several, the one that fits the layer's
    tensors. ValueError where none does."""
    problems: list[str] = []
    for scheme in _weights(settings):
        try:
            return _read_one(tensors, shape, bias, dtype, scheme)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(" or ".join(dict.fromkeys(problems)) or "config_groups names no weights that are quantised")


def read_float(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, block: tuple[int, int] | None = None
) -> PackedLinear:
    """A float8 matrix with `weight_scale`: one, one for each output, or with `block` one for each block of the matrix."""
    O, I = shape  # noqa: E741
    size = block or (O if _numbers(tensors.get("weight_scale")) == 1 else 1, I)
    grid = tuple(-(-n // b) for n, b in zip(shape, size, strict=True))
    shapes = {"weight": (shape, (torch.float8_e4m3fn,)), "weight_scale": (_as_given(tensors.get("weight_scale"), grid), _FLOATS)}
    expect(tensors, shapes)
    kept = {name: tensors[name] for name in ("weight", "weight_scale", *_BESIDE) if name in tensors}
    derived = {"scale": _over(tensors["weight_scale"].float(), grid)}
    return PackedLinear(FloatQuantized.name, shape, dtype, kept, bias, block=size[1], block_rows=size[0], derived=derived)


def _read_one(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, scheme: Mapping[str, Any]
) -> PackedLinear:
    kind, bits, strategy = scheme.get("type", "int"), scheme.get("num_bits", 8), scheme.get("strategy", "tensor")
    if "weight_packed" in tensors:
        return _read_packed(tensors, shape, bias, dtype, scheme)
    if bits != 8 or kind not in ("int", "float"):
        raise ValueError(f"weights of type {kind!r} with num_bits {bits!r} are not read unless they are packed, only those with 8")
    if "weight_g_idx" in tensors and not _as_without(tensors["weight_g_idx"], _groups(scheme, shape)[0]):
        raise ValueError("weight_g_idx says that groups are not consecutive, which is read of packed weights alone")
    if kind == "float":
        return read_float(tensors, shape, bias, dtype, _block(scheme, shape) if strategy in ("block", "group") else None)
    if strategy == "block":
        raise ValueError("int8 weights with strategy 'block' are not read")
    size, grid = _groups(scheme, shape)
    shapes = {"weight": (shape, (torch.int8,)), "weight_scale": (_as_given(tensors.get("weight_scale"), grid), _FLOATS)}
    if not scheme.get("symmetric", True) or "weight_zero_point" in tensors:
        shapes["weight_zero_point"] = (_as_given(tensors.get("weight_zero_point"), grid), (torch.int8,))
    expect(tensors, shapes)
    kept = {name: tensors[name] for name in ("weight", "weight_scale", "weight_zero_point", *_BESIDE) if name in tensors}
    zero = kept.get("weight_zero_point", torch.zeros(1, dtype=torch.int8))
    derived = {"scale": _over(tensors["weight_scale"].float(), grid), "zero": _over(zero, grid)}
    return PackedLinear(IntQuantized.name, shape, dtype, kept, bias, block=size, derived=derived)


def _read_packed(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, scheme: Mapping[str, Any]
) -> PackedLinear:
    (O, I), bits, kind = shape, scheme.get("num_bits", 8), scheme.get("type", "int")  # noqa: E741
    if kind != "int" or bits not in (4, 8):
        raise ValueError(f"packed weights of type {kind!r} with num_bits {bits!r} are not read, only int with 4 or 8")
    (size, grid), per, middle = _groups(scheme, shape), 32 // bits, 2 ** (bits - 1)
    zeros = tensors.get("weight_zero_point")
    shapes: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {"weight_scale": (grid, _FLOATS)}
    shapes["weight_packed"] = (O, -(-I // per)), (torch.int32,)
    packed = zeros is not None and zeros.dtype == torch.int32
    if not scheme.get("symmetric", True) or zeros is not None:
        shapes["weight_zero_point"] = ((-(-O // per), grid[1]) if packed else grid, (torch.int32,) if packed else (torch.int8,))
    if scheme.get("actorder") in ("group", "dynamic") and "weight_g_idx" not in tensors:
        raise ValueError("no tensor weight_g_idx, where actorder says that groups are not consecutive")
    if "weight_g_idx" in tensors:
        shapes["weight_g_idx"] = ((I,), (torch.int32, torch.int64))
    expect(tensors, shapes)
    told = tensors.get("weight_shape")
    if told is not None and (told.numel() > 2 or told.flatten().tolist() != list(shape)):
        what = told.tolist() if told.numel() <= 2 else f"{told.numel():,} numbers"
        raise ValueError(f"weight_shape is {what} where the model has {list(shape)}")
    g_idx = tensors.get("weight_g_idx")
    if g_idx is not None and bool((g_idx == -1).all()):
        raise ValueError("weight_g_idx is -1 throughout: the groups of the inputs were never stored")
    if g_idx is not None and bool(((g_idx < 0) | (g_idx >= grid[1])).any()):
        raise ValueError(f"weight_g_idx names groups from {int(g_idx.min())} to {int(g_idx.max())}, where there are {grid[1]}")
    if zeros is None:
        zero = torch.full(grid, middle, dtype=torch.uint8)
    elif packed:
        zero = unpack(zeros.T, IN_ORDER, bits)[:, :O].T
    else:
        zero = (zeros.to(torch.int16) + middle).to(torch.uint8)
    code = unpack(tensors["weight_packed"], IN_ORDER, bits)[:, :I]
    beside = {name: tensors[name] for name in _BESIDE if name in tensors}
    cls = PackQuantized if bits == 4 else PackQuantized8
    made: Any = cls.layer(code, tensors["weight_scale"], zero, g_idx, bias, dtype, size, beside=beside)
    made.zeros_stored = "" if zeros is None else "packed" if packed else "int8"
    return made  # type: ignore[no-any-return]


def _weights(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What `config_groups` say of weights."""
    for scheme in settings["config_groups"].values():
        if isinstance(found := scheme.get("weights"), Mapping):
            yield found


def _groups(scheme: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """(inputs of a group, [O, groups])."""
    (O, I), size = shape, scheme.get("group_size")  # noqa: E741
    size = I if scheme.get("strategy", "group" if size else "channel") in ("channel", "tensor") or size in (None, -1) else size
    if I % 2 or I % size:
        raise ValueError(f"group_size = {size} does not divide the {I} inputs")
    return size, (O, I // size)


def _as_without(g_idx: Tensor, size: int) -> bool:
    """Whether inputs have the groups that they would have without it. -1 throughout means that."""
    flat = g_idx.flatten().long()
    return bool((flat == -1).all()) or consecutive(flat, size)


def _block(scheme: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, int]:
    if scheme.get("strategy") == "group":
        return 1, _groups(scheme, shape)[0]
    size = scheme.get("block_structure")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"block_structure = {size}, where two numbers above 0 belong")
    return size[0], size[1]


def _numbers(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def _as_given(tensor: Tensor | None, grid: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that scales of such a grid have: the grid's, or none where one number is stored."""
    return tuple(tensor.shape) if tensor is not None and tensor.numel() == 1 else grid


def _over(given: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Scales or zeros in the shape that kernels read. One number is that of the whole matrix."""
    return (given.reshape(1, 1).expand(grid) if given.numel() == 1 else given.reshape(grid)).contiguous()


def _sides(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


def _settings(kind: str, bits: int, strategy: str) -> dict[str, Any]:
    return {"config_groups": {"all": {"weights": {"type": kind, "num_bits": bits, "strategy": strategy, "symmetric": True}}}}
