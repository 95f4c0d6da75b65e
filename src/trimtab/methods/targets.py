"""Which modules a method acts on. The rules for names are peft's, but a name that matches nothing is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from trimtab.bases.spec import Module, Spec
from trimtab.errors import ConfigError, nearest
from trimtab.methods.base import ROUTER_WEIGHT, Params, Site
from trimtab.patterns import regex_problem, whole

if TYPE_CHECKING:
    from torch import Tensor

N = TypeVar("N", int, float)


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """peft's rule: a string is a regular expression for the whole name; a list's entries match exactly or as a dotted suffix.

    A string that is no regular expression matches nothing; `unmatched` says what is wrong with it.
    """
    if isinstance(wanted, str):
        return _problem(wanted) is None and whole(wanted, name)
    return any(name == w or name.endswith("." + w) for w in wanted)


def select(
    spec: Spec,
    targets: str | Sequence[str],
    *,
    excluded: str | Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    kinds: Iterable[str] = ("linear", "conv1d"),
    option: str = "target_modules",
) -> list[Module]:
    """The modules that `targets` name, in the base's order. layers: keep these layer indices only. kinds: what the method can act on.

    ConfigError lists every name that matches nothing (one bad name among good ones too), every module of a kind that the method cannot
    take.
    """
    problems = unmatched(spec, targets, option) + (unmatched(spec, excluded, "exclude_modules") if excluded else [])
    if targets == "all-linear":
        chosen = [spec.modules[name] for name in spec.linears]
    else:
        chosen = [m for m in spec.modules.values() if matches(m.name, targets)]
        # A list of names means modules, as for peft; experts are parameters, and meant only where no module has the name.
        chosen = [m for m in chosen if m.kind != "experts" or "experts" in kinds] or chosen
    wrong_kind = [m for m in chosen if m.kind not in set(kinds)]
    problems += [f"{option}: {m.name} {_instead(m, kinds)}" for m in wrong_kind[:8]]
    if excluded:
        chosen = [m for m in chosen if not matches(m.name, excluded)]
    problems += [f"{option}: {m.name} is not run once with each token's row, so no adapter can act there" for m in chosen if not m.vectors][
        :8
    ]
    if layers is not None:
        wanted = {layers} if isinstance(layers, int) else set(layers)
        problems += [
            f"layers_to_transform: layer {i} does not exist; there are 0..{spec.num_layers - 1}"
            for i in sorted(wanted)
            if not 0 <= i < spec.num_layers
        ]
        chosen = [m for m in chosen if m.layer in wanted]
    if not problems and not chosen:
        problems = [f"{option} = {targets!r} leaves no module after exclude_modules and layers_to_transform"]
    if problems:
        raise ConfigError(
            f"cannot attach to this {spec.model_type} base",
            problems=problems,
            fix=f"names there are: {', '.join(short_names(spec, kinds))}",
        )
    return chosen


def _instead(module: Module, kinds: Iterable[str]) -> str:
    """Why a method cannot take a module of this kind."""
    if module.kind == "experts":
        return "is a parameter of experts: LoRA takes it in target_parameters"
    if module.kind == "router":
        name = ".".join(module.name.split(".")[-2:])
        return f"is a router of experts, no linear layer: name {name}.weight in LoRA's target_parameters, or {name} in modules_to_save"
    return f"is {'an' if module.kind[0] in 'aeiou' else 'a'} {module.kind} layer; this method takes {', '.join(kinds)}"


def parameters_of_experts(spec: Spec) -> list[Module]:
    """What `target_parameters` may name: the parameters of experts, and the weights of their routers under the parameter's name."""
    routers = [replace(m, name=f"{m.name}{ROUTER_WEIGHT}") for m in spec.modules.values() if m.routes]
    return [m for m in spec.modules.values() if m.kind == "experts"] + routers


def select_parameters(spec: Spec, names: Sequence[str]) -> list[Module]:
    """The parameters that `target_parameters` names: by peft's rule each exactly, or as the last dotted parts of a name.

    ConfigError lists every name that matches nothing, and every parameter where no adapter can act.
    """
    there = parameters_of_experts(spec)
    short = list(dict.fromkeys(".".join(m.name.split(".")[-3:]) for m in there))
    problems = [
        f"target_parameters: {n!r} matches no parameter of experts, and no router{nearest(n, short)}"
        for n in names
        if not any(matches(m.name, [n]) for m in there)
    ]
    chosen = [m for m in there if matches(m.name, names)]
    problems += [
        f"target_parameters: {m.name} is used in a way that trimtab does not know, so no adapter can act there"
        for m in chosen
        if not m.vectors
    ][:8]
    if problems:
        fix = f"parameters there are: {', '.join(short)}" if short else "this base has no experts: use target_modules"
        raise ConfigError(f"cannot attach to this {spec.model_type} base", problems=problems, fix=fix)
    return chosen


def unmatched(spec: Spec, wanted: str | Sequence[str], option: str) -> list[str]:
    """One finding for each name (or for the regular expression) that matches no module of the base."""
    if wanted == "all-linear":
        return []
    if isinstance(wanted, str):
        if problem := regex_problem(wanted):
            return [f"{option} = {wanted!r} {problem}"]
        if any(matches(m, wanted) for m in spec.modules):
            return []
        names = listed(wanted) or [wanted]
        if any(matches(m, [n]) for n in names for m in spec.modules):
            return [f"{option} = {wanted!r} is one string, which must match a module's whole name; {as_list(names)}"]
        return [f"{option}: {wanted!r} matches no module's whole name{nearest(wanted, short_names(spec))}"]
    return [
        f"{option}: {w!r} matches no module{nearest(w, short_names(spec))}"
        for w in wanted
        if not any(matches(m, [w]) for m in spec.modules)
    ]


def listed(text: str) -> list[str] | None:
    """The names in a string that can only be meant as a list of them ("q_proj,v_proj"), or None: no module's name holds a comma."""
    names = [n for n in re.split(r"[\s,;]+", text.strip().strip("[]")) if n]
    return names if len(names) > 1 and all(re.fullmatch(r"['\"]?[\w.-]+['\"]?", n) for n in names) else None


def as_list(names: Sequence[str]) -> str:
    """What to write instead of a string that names modules."""
    return f"write a list: [{', '.join(n.strip(chr(34) + chr(39)) for n in names)}]"


def short_names(spec: Spec, kinds: Iterable[str] | None = None) -> list[str]:
    """The distinct last parts of the base's module names ("q_proj", …), or the whole path where the last part alone says too little."""
    names = (m.name for m in spec.modules.values() if kinds is None or m.kind in set(kinds))
    return list(dict.fromkeys(n.rpartition(".")[2] for n in names))


def saved_sites(spec: Spec, names: Sequence[str] | None) -> list[Site]:
    """Sites of `modules_to_save`: whole modules, trained as the adapter's own copy. ConfigError for norms of single attention heads
    (`q_norm`, `k_norm`)."""
    if not names:
        return []
    chosen = select(spec, names, kinds=("linear", "conv1d", "embedding", "norm", "router"), option="modules_to_save")
    per_head = [m.name for m in chosen if m.vectors > 1]
    if per_head:
        raise ConfigError(
            f"cannot attach to this {spec.model_type} base",
            problems=[f"modules_to_save: {n} acts on each head apart, not on a token's row" for n in per_head[:8]],
            fix="name other modules; norms of heads stay as they are in the base",
        )
    return [Site(m.name, dict(m.parameters), saved=True, transposed=m.kind == "conv1d", router=m.kind == "router") for m in chosen]


def merge_saved(site: Site, params: Params) -> tuple[Tensor, Tensor | None]:
    """The module's trained copy in the place of its weight, (O, I) as `Method.merge` gives it, and of its bias."""
    weight = params["weight"].float().clone()
    return weight.T if site.transposed else weight, params["bias"].float().clone() if "bias" in params else None


def pattern_value(pattern: Mapping[str, N], name: str, default: N) -> N:
    """peft's rule for rank_pattern and alpha_pattern: the first key for which the name ends in a match, else the default."""
    return next((v for key, v in pattern.items() if whole(ending(key), name)), default)


def stray_keys(spec: Spec, option: str, pattern: Mapping[str, object], targeted: Sequence[str]) -> list[str]:
    """One finding for each key of rank_pattern or alpha_pattern that matches none of the modules acted on; peft ignores such keys."""
    short, found = list(dict.fromkeys(n.rpartition(".")[2] for n in targeted)), []
    for key in pattern:
        if not any(whole(ending(key), n) for n in targeted):
            other = next((n for n in spec.modules if whole(ending(key), n)), None)
            hint = f", only others such as {other}" if other else nearest(key.rpartition(".")[2], short)
            found.append(f"{option}: {key!r} matches no targeted module{hint}")
    return found


def ending(key: str) -> str:
    """A key of rank_pattern or alpha_pattern as the pattern of whole names that it stands for."""
    return rf"(.*\.)?({key})$"


def key_problem(key: str) -> str | None:
    """What is wrong with a key of rank_pattern or alpha_pattern, or None."""
    return regex_problem(key) or regex_problem(ending(key))


_problem = lru_cache(maxsize=64)(regex_problem)
