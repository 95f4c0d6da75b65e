"""Reads a `Spec` off a `transformers` causal LM and its config: the structure of a base.

Weights are not needed: the meta device will do. Every layer is read by itself. What is read here is proved by a comparison before the base
is used (`forward/proof.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import nn

from trimtab.bases.spec import Defaults, Kind, Layer, Module, Spec
from trimtab.bases.weights import claimed
from trimtab.errors import BaseError

OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense")
"""What families call the projection behind the attention. Shapes do not tell it from the queries' projection."""
MATRICES = ("linear", "conv1d", "experts")
ATTENTION_LAYERS = ("full_attention", "sliding_attention")
"""The kinds of layers, in transformers' words, whose state is keys and values."""
CHOSEN_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k")
"""What configs call the number of experts that a row is sent to."""
NOT_SEEN = ("attention_chunk_size",)
"""Settings that change attention only after more tokens than the proof runs."""


def read_spec(model: Any) -> Spec:
    """Read the spec off a `transformers` causal LM. BaseError where its config asks for something that is not supported, or where the model
    is not built of what a `Spec` describes."""
    config = model.config
    _refuse_unsupported(config)
    names = {id(module): name for name, module in model.named_modules()}
    body, embedding, head = model.base_model, model.get_input_embeddings(), model.get_output_embeddings()
    if body is model or id(embedding) not in names or id(head) not in names:
        raise _unknown(config, "it has no body, no token embedding or no output head of its own")
    layer_list = _layer_list(model, config)
    attentions = [_attention(layer, f"{layer_list}.{i}", config) for i, layer in enumerate(model.get_submodule(layer_list))]
    by_name = {a["attention"]: a for a in attentions}
    modules = {m.name: m for name, module in model.named_modules() for m in _leaves(name, module, layer_list, by_name)}
    modules |= {m.name: m for m in _routers(model, modules, [a["attention"] for a in attentions])}
    _refuse_ends(config, modules.get(names[id(embedding)]), modules.get(names[id(head)]))
    inside: list[list[Module]] = [[] for _ in attentions]
    for m in modules.values():
        if m.layer is not None:
            inside[m.layer].append(m)
    mlps = [_mlp(a["name"], a["attention"], m, config) for a, m in zip(attentions, inside, strict=True)]
    return Spec(
        model_type=config.model_type,
        defaults=_defaults(attentions, mlps, inside),
        body=names[id(body)],
        layer_list=layer_list,
        embedding=names[id(embedding)],
        head=names[id(head)],
        layers=tuple(Layer(**a, **m) for a, m in zip(attentions, mlps, strict=True)),
        modules=modules,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=_max_positions(config),
        tied_head=bool(config.tie_word_embeddings),
        final_softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=_logit_scale(config),
        layers_share_kv=bool(getattr(config, "num_kv_shared_layers", 0)),
        layer_embeddings=bool(getattr(config, "hidden_size_per_layer_input", 0)) and hasattr(body, "get_per_layer_inputs"),
        writes_results=config.model_type == "falcon" or getattr(config, "clip_qkv", None) is not None,
        num_parameters=_num_parameters(model),
        experts_per_token=_experts_per_token(config),
    )


def _refuse_ends(config: Any, embedding: Module | None, head: Module | None) -> None:
    """BaseError where the token embedding or the output head is of another kind or width than the hidden states ask for."""
    if embedding is None or head is None:
        raise _unknown(config, "its token embedding or its output head is of a kind that trimtab does not know")
    wide = sorted({embedding.out_features, head.in_features})
    if wide != [config.hidden_size]:
        found = ", ".join(map(str, wide))
        raise _unknown(config, f"its embedding or head has {found} features, where hidden states have {config.hidden_size}")


def _defaults(attentions: Sequence[Mapping[str, Any]], mlps: Sequence[Mapping[str, Any]], inside: Sequence[Sequence[Module]]) -> Defaults:
    """The default targets: the projections of queries and values, of keys and values, and the last matrix of the MLP; a projection that
    gives all of them where there is one. Experts are no default."""
    lora, keys_values, feedforward = dict[str, None](), dict[str, None](), dict[str, None]()
    for attention, mlp, leaves in zip(attentions, mlps, inside, strict=True):
        linear = [m.name for m in leaves if m.kind in ("linear", "conv1d")]
        made = [n for n in linear if n.startswith(f"{attention['attention']}.") and n != attention["attention_output"]]
        queries_alone = sum(m.out_features for m in leaves if m.name in made) == attention["num_heads"] * attention["head_dim"]
        one_each = {letter: [n for n in made if n.rpartition(".")[2].startswith(letter)] for letter in "qkv"}
        apart = len(made) >= 3 and all(len(found) == 1 for found in one_each.values())
        last = [
            m.name for m in leaves if m.name in linear and _in_mlp(m.name, attention, mlp) and m.in_features == mlp["intermediate_size"]
        ]
        lora |= dict.fromkeys(_suffix(n, linear) for n in (one_each["q"] + one_each["v"] if apart else made))
        of_keys = one_each["k"] + one_each["v"] if apart else [] if queries_alone else made
        keys_values |= dict.fromkeys(_suffix(n, linear) for n in of_keys)
        feedforward |= dict.fromkeys(_suffix(n, linear) for n in last[-1:])
    return Defaults(tuple(lora), (*keys_values, *feedforward), tuple(feedforward))


def _in_mlp(name: str, attention: Mapping[str, Any], mlp: Mapping[str, Any]) -> bool:
    """Whether a module of a layer belongs to its MLP."""
    return name.startswith(f"{mlp['mlp']}.") if mlp["mlp"] else not name.startswith(f"{attention['attention']}.")


def _suffix(name: str, others: Sequence[str]) -> str:
    """The shortest end of a module's name that no other module of its layer has."""
    parts = name.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next(end for end in ends if not any(o != name and f".{o}".endswith(f".{end}") for o in others))


def window_of(attention: Any) -> int | None:
    """How many tokens an attention module of transformers looks back on, itself included; None: all."""
    where = attention if hasattr(attention, "sliding_window") else attention.config
    return getattr(where, "sliding_window", None) or None


def _refuse_unsupported(config: Any) -> None:
    """Refuse by name whatever would make one row's result depend on other rows, or that the attention function does not compute exactly."""
    problems = []
    if getattr(config, "use_bidirectional_attention", False) not in (False, None, "vision"):  # "vision": of images alone
        problems.append("use_bidirectional_attention is set: only causal attention is supported")
    kinds = [k for k in dict.fromkeys(getattr(config, "layer_types", None) or ()) if k not in ATTENTION_LAYERS]
    problems += [f"layers of type {k!r}: only {' and '.join(ATTENTION_LAYERS)} are supported" for k in kinds]
    problems += [f"{name} = {getattr(config, name)!r} is not supported" for name in NOT_SEEN if getattr(config, name, None)]
    if getattr(config, "add_cross_attention", False):
        problems.append("add_cross_attention is set: only decoder-only models are supported")
    if getattr(config, "alibi", False):
        problems.append("alibi is set: attention with linear biases is not supported")
    if problems:
        raise BaseError(f"this {config.model_type} model needs what trimtab does not support", problems=problems)


def _max_positions(config: Any) -> int:
    """How many positions the base has. Rotary embeddings of type "dynamic" and "longrope" change for the whole batch as soon as one of its
    sequences is longer than those that they were first trained on. Only the positions before that are used."""
    found = [config.max_position_embeddings]
    for rope in _ropes(config):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            trained = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            found.append(trained or config.max_position_embeddings)
    return min(found)


def _num_parameters(model: Any) -> int:
    """Entries of matrices that are packed, and of parameters."""
    packed = {n: w for n, m in model.named_modules() if (w := claimed(m)) is not None and not w.stored_dense}
    own = {id(t) for n in packed for part, t in model.get_submodule(n)._parameters.items() if part != "bias"}
    return sum(math.prod(w.shape) for w in packed.values()) + sum(p.numel() for p in model.parameters() if id(p) not in own)


def _experts_per_token(config: Any) -> float:
    """How many experts a router chooses, under the names that families give it; the mean where layers differ."""
    found = next((n for name in CHOSEN_EXPERTS if (n := getattr(config, name, None))), 0)
    return sum(found) / len(found) if isinstance(found, list | tuple) else float(found)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of rotary embeddings: one for all layers, or one for each kind."""
    ropes = getattr(config, "rope_parameters", None) or {}
    return [ropes, *(v for v in ropes.values() if isinstance(v, dict))]


def _logit_scale(config: Any) -> float:
    """What the class multiplies its logits with, under the names that families give it. The proof shows whether it is so."""
    multiplied = (getattr(config, "logit_scale", None), getattr(config, "lm_head_multiplier", None))
    scale = next((float(m) for m in multiplied if m), 1.0)
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return scale * scaling if config.model_type == "hyperclovax" else scale / scaling


def _unknown(config: Any, problem: str) -> BaseError:
    return BaseError(f"this {config.model_type} model is built in a way that trimtab does not know", problems=[problem])


def _layer_list(model: Any, config: Any) -> str:
    """The name of the list of layers: the outermost module list with as many entries as the config has layers."""
    found: list[str] = []
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == config.num_hidden_layers
            and not name.startswith(tuple(f"{f}." for f in found))
        ):
            found.append(name)
    if len(found) != 1:
        raise _unknown(config, f"lists of {config.num_hidden_layers} layers, of which there should be one: {', '.join(found) or 'none'}")
    return found[0]


def _attention(layer: nn.Module, at: str, config: Any) -> dict[str, Any]:
    """The attention's part of a `Layer`. Heads are told from what the projections give and what the last of them reads."""
    found = [(f"{at}.{n}", child) for n, child in layer.named_children() if hasattr(child, "is_causal")]
    if len(found) != 1:
        none = "none that runs through transformers' attention interface"
        raise _unknown(config, f"attention modules in {at}, of which there should be one: {', '.join(n for n, _ in found) or none}")
    name, attention = found[0]
    features = {f"{name}.{n}": (i, o) for n, m in attention.named_modules() for _, i, o in _matrix(m)}
    outputs = [n for n in features if n.rpartition(".")[2] in OUTPUT_PROJECTIONS]
    if len(outputs) != 1:
        raise _unknown(
            config, f"{name} has no output projection, or several, by the names that trimtab knows: {', '.join(OUTPUT_PROJECTIONS)}"
        )
    width, into = features[outputs[0]][0], {n.rpartition(".")[2]: o for n, (_, o) in features.items() if n != outputs[0]}
    heads, kv_heads, head_dim, value_dim, fits = _heads(attention, width, into, config)
    if kv_heads < 1 or heads % kv_heads or not fits:
        made = sum(into.values())
        raise _unknown(config, f"{name} makes {made} features of a token and reads {width}: no number of heads of {head_dim} features fits")
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
    return {"name": at, "attention": name, "attention_output": outputs[0], "window": window_of(attention)} | sizes


def _heads(attention: Any, width: int, into: Mapping[str, int], config: Any) -> tuple[int, int, int, int, bool]:
    """(query heads, key heads, features of a head's keys, of its values, whether the projections make just these). width: features that
    the output projection reads. into: projection -> features that it makes."""
    head_dim = getattr(attention, "qk_head_dim", None) or getattr(attention, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    value_dim = getattr(attention, "v_head_dim", None) or head_dim
    heads, share = width // value_dim, getattr(attention, "num_key_value_groups", None)
    if "kv_b_proj" in into:  # keys and values are made of a compressed vector, for each query head its own
        made = next((into[n] for n in ("q_b_proj", "q_proj") if n in into), 0)
        return heads, heads, head_dim, value_dim, (heads * value_dim, heads * head_dim) == (width, made)
    letters, queries = {n[0] for n in into}, heads * head_dim
    if {"q", "k"} <= letters:  # and a gate of the attention's result
        into = {n: o for n, o in into.items() if n[0] in "qkv"}
    made = sum(into.values())
    if share and made == queries:  # keys and values are those of a layer before
        return heads, heads // share, head_dim, value_dim, heads * value_dim == width
    of_one = head_dim if {"q", "k"} <= letters and "v" not in letters else head_dim + value_dim  # values may be made of the keys
    kv_heads = (made - queries) // of_one
    fits = (heads * value_dim, queries + kv_heads * of_one) == (width, made) and share in (None, heads // max(1, kv_heads))
    return heads, kv_heads, head_dim, value_dim, fits


def _mlp(at: str, attention: str, leaves: list[Module], config: Any) -> dict[str, Any]:
    """The MLP's part of a `Layer`: the part beside the attention that holds several matrices. Where there is none, or more than one, the
    sizes are those of all matrices beside the attention."""
    parts: dict[str, list[Module]] = {}
    for m in leaves:
        part = ".".join(m.name.split(".")[: at.count(".") + 2])
        if m.kind in MATRICES and part != attention:
            parts.setdefault(part, []).append(m)
    if not parts:
        raise _unknown(config, f"{at} has no matrices beside its attention")
    found = [name for name, matrices in parts.items() if len(matrices) > 1]
    name = found[0] if len(found) == 1 else None
    matrices, H = [m for matrices in parts.values() for m in matrices] if name is None else parts[name], config.hidden_size
    out = [i for i, m in enumerate(matrices) if m.out_features == H]
    last = max(out, key=lambda i: i if name else matrices[i].in_features, default=0)
    inner = matrices[last].in_features
    return {"mlp": name, "intermediate_size": inner, "gated": sum(m.out_features for m in matrices[:last]) >= 2 * inner}


def _leaves(name: str, module: nn.Module, layer_list: str, attentions: Mapping[str, Mapping[str, Any]]) -> Iterator[Module]:
    """What a module itself holds, without what is inside it."""
    kind = type(module).__name__
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
    weight = claimed(module)
    if weight is not None and not weight.stored_dense:
        shapes = {"weight": weight.shape} | {n: shape for n, shape in shapes.items() if n == "bias"}
    layer = int(name.removeprefix(f"{layer_list}.").split(".")[0]) if name.startswith(f"{layer_list}.") else None
    bits = None if weight is None or weight.stored_dense else 8 * weight.nbytes / math.prod(weight.shape)
    if weight is not None and (experts := getattr(module, "experts", 0)):
        out, into = weight.shape[0] // experts, weight.shape[1]
        yield Module(name, "experts", into, out, layer, {"weight": (experts, out, into)}, bits=bits, experts=experts)
        return
    for matrix in _matrix(module):
        yield Module(name, *matrix, layer, shapes, bits=bits)
    if isinstance(module, nn.Embedding):
        alone = len(signature(type(module).forward).parameters) == 2  # OPT's positions are told from a mask and more
        yield Module(name, "embedding", module.num_embeddings, module.embedding_dim, layer, shapes, int(alone))
    elif kind.endswith("Norm") and list(shapes)[:1] == ["weight"]:
        width, around = shapes["weight"][0], attentions.get(name.rpartition(".")[0], {})
        heads = "num_heads" if name.rpartition(".")[2].startswith("q") else "num_kv_heads"
        yield Module(name, "norm", width, width, layer, shapes, around[heads] if width == around.get("head_dim") else 1)
    for n, shape in shapes.items():
        if len(shape) == 3:
            out, into = reversed(shape[1:]) if getattr(module, "is_transposed", False) else shape[1:]
            yield Module(f"{name}.{n}", "experts", into, out, layer, {"weight": shape}, experts=shape[0])


def _routers(model: Any, modules: Mapping[str, Module], attentions: Sequence[str]) -> Iterator[Module]:
    """The modules that choose experts: beside the experts, those whose matrix gives a number for each of them. One that only multiplies
    stays a linear layer."""
    blocks = {m.name.rsplit(".", 2)[0]: m for m in modules.values() if m.kind == "experts"}
    for block, experts in blocks.items():
        outputs, inputs = experts.experts, model.config.hidden_size
        for name, part in model.get_submodule(block).named_modules(prefix=block):
            shapes = {n: tuple(p.shape) for n, p in part.named_parameters(recurse=False)}
            if shapes.get("weight") != (outputs, inputs) or name.startswith(tuple(attentions)):
                continue
            if type(part).forward is nn.Linear.forward:
                yield replace(modules[name], routes=True)
            elif shapes.keys() <= {"weight", "bias"}:
                yield Module(name, "router", inputs, outputs, experts.layer, shapes, routes=True)


def _matrix(module: nn.Module) -> list[tuple[Kind, int, int]]:
    """(kind, features in, features out) of a linear layer: a module whose matrix a format claims, or torch's own; else nothing."""
    weight = None if isinstance(module, nn.Embedding) else claimed(module)
    if weight is not None:
        outputs, inputs = weight.shape
        return [("conv1d" if type(module).__name__ == "Conv1D" else "linear", inputs, outputs)]
    return [("linear", module.in_features, module.out_features)] if isinstance(module, nn.Linear) else []
