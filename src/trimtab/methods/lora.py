"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732), and the
configuration of DoRA, whose mathematics is in `dora.py`.

    y = W x + b + s · B (A dropout(x))        s = lora_alpha / r, or lora_alpha / √r with use_rslora

W [O, I] frozen; A [r, I] kaiming-uniform(a=√5); B [O, r] zero; other starts are in `lora_start.py`. On an embedding: y = E[t] + s · Aᵀ[t]
Bᵀ with A [r, V] zero, B [H, r] normal.
Activated LoRA (aLoRA: Greenewald et al. 2025, arXiv:2504.12397), with alora_invocation_tokens: rows before the last occurrence of these ids
are the base's.
On a router of experts (`target_parameters` again): the router runs with W + s B A in place of its matrix W.
On a parameter with a matrix for each of E experts every expert has factors of its own (`target_parameters`), kept as peft keeps them:
A [r·E, I] is (E, r, I), B [O, r·E] is (O, r, E). Rows are grouped by adapter and expert, so dropout works there too.
Dimensions: I in, O out, r rank, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab import ops
from trimtab.bases.spec import Module, Spec
from trimtab.errors import ConfigError, NotMergeable, first_of
from trimtab.methods import dora, lora_start
from trimtab.methods.base import ROUTER_WEIGHT, BaseView, Method, Packed, Params, Site, TargetedMethod
from trimtab.methods.targets import key_problem, merge_saved, pattern_value, saved_sites, select, select_parameters, stray_keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trimtab.bases.weights import Weight

MAX_RANK = 4096


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TargetedMethod):
    """LoRA's hyperparameters, under peft's names.

    r: rank. lora_alpha: numerator of the scaling; None means 2r. lora_dropout: dropout on the adapter's input, in [0, 1).
    target_modules: "all-linear" by default, which beats attention only at equal size ("LoRA Without Regret").
    rank_pattern, alpha_pattern: r and alpha for modules whose name ends in a match of the key (the first key that matches counts; one that
    matches no targeted module is refused, where peft ignores it).
    layers_to_transform: the layers whose modules to act on. use_rslora: divide lora_alpha by √r, not by r. use_dora: DoRA, which trains the
    lengths of the weights apart. init_lora_weights: where A and B start (`lora_start.py`); eva_config: how EVA does.
    alora_invocation_tokens: the ids that activate an aLoRA, which each trained row must have.
    target_parameters: parameters of experts ("mlp.experts.gate_up_proj") and of their routers ("mlp.gate.weight"), beside target_modules;
    `target_modules: []` for these alone.
    target_experts: the numbers of the experts to act on; None: all. In a file the others are zeros.
    """

    peft_type: ClassVar[str] = "LORA"
    name: ClassVar[str] = "lora"
    preset_lr: ClassVar[float] = 1e-3
    """Larger bases want 2e-4."""
    in_peft: ClassVar[bool] = True

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] | None = "all-linear"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | tuple[int, ...] | None = None
    target_parameters: tuple[str, ...] | None = None
    target_experts: tuple[int, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    eva_config: dict[str, float | bool] = field(default_factory=dict)
    alora_invocation_tokens: tuple[int, ...] | None = None

    @property
    def invocation(self) -> tuple[int, ...]:
        return self.alora_invocation_tokens or ()

    def eva(self, key: str) -> Any:
        """A value of `eva_config`, with its default written out."""
        return self.eva_config.get(key, lora_start.EVA[key])

    @property
    def alpha(self) -> float:
        """lora_alpha, with its default written out."""
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * self.r

    def problems(self) -> list[str]:
        ranks: dict[str, int] = {"r": self.r} | {f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}
        found = [f"{k} = {v}: a rank is at least 1 and at most {MAX_RANK}" for k, v in ranks.items() if not 1 <= v <= MAX_RANK]
        alphas: dict[str, float | None] = {"lora_alpha": self.lora_alpha} | {
            f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()
        }
        found += [f"{k} = {v}: must be a finite number above 0" for k, v in alphas.items() if v is not None and not (0 < v < math.inf)]
        patterns: dict[str, dict[str, int] | dict[str, float]] = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        found += [f"{option}: {key!r} {problem}" for option, keys in patterns.items() for key in keys if (problem := key_problem(key))]
        if not 0.0 <= self.lora_dropout < 1.0:
            found.append(f"lora_dropout = {self.lora_dropout}: must be in [0, 1)")
        if any(i < 0 for i in self.invocation):
            found.append(f"alora_invocation_tokens = {list(self.invocation)}: token ids, 0 or more")
        if self.invocation and (self.use_dora or self.modules_to_save):
            other = "use_dora" if self.use_dora else "modules_to_save"
            found.append(f"alora_invocation_tokens with {other}: an aLoRA adds two factors to the rows that it is on for, and nothing else")
        if self.target_parameters and self.invocation:
            found.append("alora_invocation_tokens: an aLoRA does not act on target_parameters")
        if self.target_parameters and self.use_dora:
            found.append("use_dora: DoRA does not act on target_parameters; use plain LoRA there, or a variant of its own")
        if self.target_experts is not None and not self.target_parameters:
            found.append("target_experts: it chooses among the experts of target_parameters, and these are not set")
        if self.target_experts is not None and (not self.target_experts or min(self.target_experts) < 0):
            found.append(f"target_experts = {list(self.target_experts)}: the numbers of some experts, from 0")
        if self.target_parameters and self.init_lora_weights is not True:
            found.append(f"init_lora_weights = {self.init_lora_weights!r}: target_parameters start as with true; use a variant of its own")
        if self.eva_config and self.init_lora_weights != "eva":
            found.append(f"eva_config: it says how init_lora_weights: eva begins, and this is {self.init_lora_weights!r}")
        found += lora_start.eva_problems(self.eva_config)
        if wrong := lora_start.problem(self.init_lora_weights):
            return [*found, wrong]
        if lora_start.subtracted(self.init_lora_weights):
            said = f"init_lora_weights = {self.init_lora_weights!r} is subtracted again by the adapter, which"
            found += [f"{said} then has twice the rank: {k} = {v} is above {MAX_RANK // 2}" for k, v in ranks.items() if v > MAX_RANK // 2]
            found += [f"{said} dropout would not reach alike: lora_dropout = {self.lora_dropout} must be 0"] if self.lora_dropout else []
        return found

    @classmethod
    def examples(cls) -> list[Method]:
        return [
            cls(r=4, lora_alpha=8),
            cls(r=8, lora_alpha=12, use_rslora=True, target_modules=None),
            cls(r=4, use_dora=True),
            cls(r=2, rank_pattern={"mlp.*": 6}, alpha_pattern={"mlp.*": 3}, layers_to_transform=(1,), init_lora_weights="pissa"),
        ]

    @property
    def fresh_is_base(self) -> bool:
        return self.init_lora_weights != "loftq"

    def sites(self, spec: Spec) -> list[Site]:
        sites, saved, problems = self._places(spec)
        self._refuse(spec, sites, problems)
        return sites + saved

    def sites_to_train(self, spec: Spec) -> list[Site]:
        """`sites`; ConfigError too if a rank is above a module's smaller side: it could learn no more than that side's rank. Adapters
        from elsewhere have such ranks (PiSSA's, converted to LoRA, have twice r) and are computed as they are."""
        sites, saved, problems = self._places(spec)
        sides = {s.name: min(spec.modules[s.name].in_features, spec.modules[s.name].out_features) for s in sites}
        high = [f"{s.name}: rank {s.rank} is above its smaller side {sides[s.name]}" for s in sites if s.rank > sides[s.name]]
        kind = self.init_lora_weights
        high += [f"{s.name} is an embedding, which has no start {kind!r}" for s in sites if kind is not True and _is_embedding(s.shapes)]
        self._refuse(spec, sites, high + problems)
        return sites + saved

    def _places(self, spec: Spec) -> tuple[list[Site], list[Site], list[str]]:
        """(sites with factors, sites trained in full, modules that are both)."""
        sites, saved = [self._site(m) for m in self._targets(spec)], saved_sites(spec, self.modules_to_save)
        sites += self._expert_sites(spec)
        names = Counter(s.name for s in sites)
        problems = [f"{n} is both in target_modules and, by its weight, in target_parameters" for n, times in names.items() if times > 1]
        problems += [f"{s.name} is both in target_modules and in modules_to_save" for s in saved if s.name in names]
        beyond = [i for i in self.invocation if i >= spec.vocab_size]
        problems += [f"alora_invocation_tokens: {beyond[0]} is no token of this base, which has {spec.vocab_size}"] if beyond else []
        tables = [n for n in names if self.invocation and spec.modules[n].kind == "embedding"]
        return sites, saved, problems + [f"{n} is an embedding, and an aLoRA acts on linear layers alone" for n in tables]

    def _refuse(self, spec: Spec, sites: Sequence[Site], problems: list[str]) -> None:
        names = [s.named for s in sites]
        stray = self._stray_keys(spec, names)
        if stray or problems:
            found, short = stray + problems, dict.fromkeys(n.rpartition(".")[2] for n in names)
            shown = first_of(found, 8)
            fixes = [f"correct these keys, or take them away; targeted are: {', '.join(short)}"] if stray else []
            fixes += ["lower r or rank_pattern, or exclude these modules"] if problems else []
            raise ConfigError(f"LoRA cannot attach to this {spec.model_type} base", problems=shown, fix="; ".join(fixes))

    def _expert_sites(self, spec: Spec) -> list[Site]:
        """The sites at parameters of experts. peft wraps a module once for each of its parameters that are targeted, the last one
        outermost, and this nesting is in the names of its files."""
        sites, problems, wrappers = [], [], dict[str, int]()
        for module in reversed(select_parameters(spec, self.target_parameters or ())):
            if module.routes:  # a linear layer that only multiplies takes LoRA as any other does
                name = module.name.removesuffix(ROUTER_WEIGHT)
                sites.append(replace(self._site(module), name=name, router=module.kind == "router", by_weight=True))
                continue
            experts, at = module.experts, module.name.rpartition(".")[0]
            inside = wrappers[at] = wrappers.get(at, -1) + 1
            site = self._site(module)
            shapes = {
                "lora_A.weight": (site.rank * experts, module.in_features),
                "lora_B.weight": (module.out_features, site.rank * experts),
            }
            sites.append(replace(site, shapes=shapes, experts=experts, stored=at + ".base_layer" * inside))
            wrong = [e for e in self.target_experts or () if e >= experts]
            problems += [f"target_experts: {e} does not exist in {module.name}; there are 0..{experts - 1}" for e in wrong]
        if problems:
            raise ConfigError(
                f"LoRA cannot attach to this {spec.model_type} base", problems=first_of(problems, 8), fix="name experts there are"
            )
        if self.target_experts and not wrappers:
            raise ConfigError(
                f"LoRA cannot attach to this {spec.model_type} base",
                problems=["target_experts: it chooses among the experts of target_parameters, and these are routers alone"],
                fix="take target_experts away, or name parameters of experts",
            )
        if self.lora_dropout and (routers := [s.name for s in sites if s.router]):
            raise ConfigError(
                f"LoRA cannot attach to this {spec.model_type} base",
                problems=[
                    f"lora_dropout = {self.lora_dropout}: a router is run with another matrix, whose input has no dropout: {routers[-1]}"
                ],
                fix="set lora_dropout: 0, or take the router out of target_parameters",
            )
        return sites[::-1]

    def _targets(self, spec: Spec) -> list[Module]:
        if self.target_parameters and self.target_modules == ():
            return []
        try:
            return select(
                spec,
                self.target_modules if self.target_modules is not None else spec.defaults.lora_targets,
                excluded=self.exclude_modules,
                layers=self.layers_to_transform,
                kinds=("linear", "conv1d") if self.use_dora else ("linear", "conv1d", "embedding"),
            )
        except ConfigError as e:  # which modules are meant is not known; a key that no module at all has is wrong whichever they are
            raise ConfigError(e.message, problems=[*e.problems, *self._stray_keys(spec, list(spec.modules))], fix=e.fix) from None

    def _stray_keys(self, spec: Spec, targeted: Sequence[str]) -> list[str]:
        ranks, alphas = (stray_keys(spec, p, getattr(self, p), targeted) for p in ("rank_pattern", "alpha_pattern"))
        return ranks + alphas

    def _site(self, module: Module) -> Site:
        r = pattern_value(self.rank_pattern, module.name, self.r)
        alpha = pattern_value(self.alpha_pattern, module.name, self.alpha)
        scaling = alpha / math.sqrt(r) if self.use_rslora else alpha / r
        if module.kind == "embedding":
            shapes: dict[str, tuple[int, ...]] = {"lora_embedding_A": (r, module.in_features), "lora_embedding_B": (module.out_features, r)}
        else:
            shapes = {"lora_A.weight": (r, module.in_features), "lora_B.weight": (module.out_features, r)}
        if self.use_dora:
            shapes["lora_magnitude_vector"] = (module.out_features,)
        fixed: tuple[str, ...] = ()
        if lora_start.subtracted(self.init_lora_weights) and not _is_embedding(shapes):
            shapes |= {lora_start.A0: shapes[lora_start.A], lora_start.B0: shapes[lora_start.B]}
            fixed = (lora_start.A0, lora_start.B0)
        return Site(module.name, shapes, rank=r, scaling=scaling, fixed=fixed)

    def init(self, site: Site, base: BaseView, generator: torch.Generator, factor_A: Tensor | None = None) -> dict[str, Tensor]:
        """factor_A: A, where rows have said it."""
        if site.saved:
            return base.parameters_of(site.name)
        import torch

        params = {name: torch.zeros(shape, dtype=torch.float32) for name, shape in site.shapes.items()}
        if "lora_embedding_B" in params:
            params["lora_embedding_B"].normal_(generator=generator)
        elif factor_A is not None:
            params[lora_start.A] = factor_A
        else:
            params |= lora_start.start(self.init_lora_weights, site, base, generator)
            if site.experts and self.target_experts is not None:
                others = [e for e in range(site.experts) if e not in self.target_experts]
                params["lora_A.weight"].view(site.experts, site.rank, -1)[others] = 0
        if self.use_dora:
            matrix, (A, B) = base.matrix(site.name), lora_start.factors(params)
            begins = () if self.fresh_is_base else (A.to(matrix.device), site.scaling * B.to(matrix.device))
            params["lora_magnitude_vector"] = dora.norm(matrix, *begins)
        return params

    def export(self, params: Mapping[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        """Where the start is subtracted: a LoRA of twice the rank, of the same scaling."""
        if self.init_lora_weights is True:
            return self, dict(params)
        plain = replace(self, init_lora_weights=True, eva_config={})
        if not lora_start.subtracted(self.init_lora_weights):
            return plain, dict(params)
        twice = math.sqrt(2) if self.use_rslora else 2.0
        ranks, alphas = {k: 2 * v for k, v in self.rank_pattern.items()}, {k: twice * v for k, v in self.alpha_pattern.items()}
        plain = replace(plain, r=2 * self.r, lora_alpha=twice * self.alpha, rank_pattern=ranks, alpha_pattern=alphas)
        found = {k: t for k, t in params.items() if not k.endswith((lora_start.A0, lora_start.B0))}
        for key in [k.removesuffix(lora_start.A0) for k in params if k.endswith(lora_start.A0)]:
            mine = {n: params[key + n] for n in (lora_start.A, lora_start.B, lora_start.A0, lora_start.B0)}
            found[key + lora_start.A], found[key + lora_start.B] = lora_start.factors(mine)
        return plain, found

    def pack(self, site: Site, params: Params, dtype: torch.dtype, matrix: Weight | None) -> Packed:
        if site.saved:
            return Packed(ops.replace, {k: v.to(dtype) for k, v in params.items()})
        A, B = _factors(site, params)
        if site.experts:
            return self._pack_experts(A, site.scaling * B, dtype)
        if site.router:  # what it gives is no sum of a base's part and an adapter's: it chooses
            assert matrix is not None
            weight_EH = matrix.dense()
            return Packed(ops.replace, {"weight": (weight_EH.float() + site.scaling * (B.float() @ A.float())).to(weight_EH.dtype)})
        if self.use_dora:
            assert matrix is not None
            return dora.pack(A, site.scaling * B, params["lora_magnitude_vector"], matrix, self.lora_dropout)
        if not self.lora_dropout and "lora_A.weight" in params and ops.trains_grouped(A, B, dtype):
            return Packed(ops.lora_grouped, {}, factors=ops.Factors(A, B, site.scaling, dtype))
        kernel = ops.lora_embedding if "lora_embedding_A" in params else ops.lora
        return Packed(kernel, {"A": A.to(dtype), "B": (site.scaling * B).to(dtype)}, self.lora_dropout)

    def _pack_experts(self, A_ERI: Tensor, B_EOR: Tensor, dtype: torch.dtype) -> Packed:
        tensors = {"expert_A": A_ERI, "expert_B": B_EOR}
        if self.target_experts is None:
            return Packed(ops.lora_experts, {n: t.to(dtype).contiguous() for n, t in tensors.items()}, self.lora_dropout)
        import torch

        chosen = torch.tensor(sorted(set(self.target_experts)), device=A_ERI.device)
        place = torch.full((len(A_ERI),), -1, device=A_ERI.device, dtype=torch.int64)
        place[chosen] = torch.arange(len(chosen), device=A_ERI.device)
        return Packed(
            ops.lora_experts, {n: t[chosen].to(dtype).contiguous() for n, t in tensors.items()} | {"place": place}, self.lora_dropout
        )

    def merge(self, site: Site, weight_OI: Tensor, bias_O: Tensor | None, params: Params) -> tuple[Tensor, Tensor | None]:
        if self.invocation:
            reason = "an aLoRA is off before its invocation tokens, and a merged weight would be on for every token"
            raise NotMergeable(reason, fix="serve the adapter beside the base")
        if site.saved:
            return merge_saved(site, params)
        A, B = _factors(site, params)
        merged = (B.float() @ A.float()).mul_(site.scaling)
        if "lora_embedding_A" in params:
            merged = merged.T  # an embedding's weight is (V, H)
        merged += weight_OI  # in place: of a large vocabulary's matrix there should be one in fp32
        if self.use_dora:
            merged = dora.merge(merged, params["lora_magnitude_vector"])
        return merged, None if bias_O is None else bias_O.float().clone()

    def of_rows(self, site: Site, params: Params, rows: slice) -> Params | None:
        if self.use_dora or site.saved or site.experts or site.router:
            return None
        if _is_embedding(site.shapes):
            return {**params, "lora_embedding_A": params["lora_embedding_A"][:, rows]}
        return {name: t[rows] if name in (lora_start.B, lora_start.B0) else t for name, t in params.items()}


def _factors(site: Site, params: Params) -> tuple[Tensor, Tensor]:
    """(A [r, I], B [O, r]); at parameters of experts (A [E, r, I], B [E, O, r])."""
    if site.experts:
        A, B = params["lora_A.weight"], params["lora_B.weight"]
        return A.view(site.experts, site.rank, -1), B.view(len(B), site.rank, site.experts).permute(2, 0, 1)
    return lora_start.factors(params)


def _is_embedding(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return "lora_embedding_A" in shapes
