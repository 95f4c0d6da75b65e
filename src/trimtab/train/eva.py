"""EVA: where LoRA starts, told from a variant's own rows (Paischer et al. 2024, arXiv:2410.07170), as `peft` computes it.

A of a module is the first right-singular vectors of what the module reads at the supervised tokens, found by incremental PCA over forwards
of the base; B is zero. The ranks of all modules together stay the same, but a module gets those of its directions that explain most: at
most rho · r, none at all where others explain more. Scalings follow the ranks, so that s = lora_alpha / r stays a module's own.

Dimensions: T tokens of a forward, I in, N components.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.data import Example
from trimtab.errors import ConfigError
from trimtab.forward.batch import Piece
from trimtab.forward.packs import Mix
from trimtab.methods import LoraConfig
from trimtab.methods.base import Site
from trimtab.model import Base
from trimtab.train.variant import Rows

SEED = 42
"""Of the random directions with which a truncated decomposition begins."""
ROUNDING = 1e-12
"""Part of a sum of squares below which a spread is fp32's rounding: the inputs are all the same, and no direction explains anything."""
ROUNDS = 4
"""Of subspace iteration in it."""
MOST_FORWARDS = 256
"""After so many the directions are taken not to settle."""


def begin(base: Base, method: LoraConfig, rows: Rows, max_tokens: int, seed: int) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(the method with the ranks of its modules, a new adapter's tensors). rows: the variant's batches, from the first. max_tokens: of a
    forward. ConfigError where the directions do not settle."""
    sites = [s for s in method.sites_to_train(base.spec) if not s.saved]
    taken, components = _directions(base, method, sites, rows, max_tokens)
    adjust, r, alpha = method.eva("adjust_scaling_factors"), {s.name: s.rank for s in sites}, dict[str, float]()
    for site in sites:
        own = site.scaling * (site.rank**0.5 if method.use_rslora else site.rank)
        alpha[site.name] = own * taken[site.name] / r[site.name] if adjust else own
    names = tuple(s.name for s in sites if taken[s.name])
    changed = replace(
        method,
        target_modules=names,
        exclude_modules=None,
        layers_to_transform=None,
        rank_pattern={n: taken[n] for n in names if taken[n] != method.r},
        alpha_pattern={n: alpha[n] for n in names if alpha[n] != method.alpha},
    )
    generator, params = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for site in changed.sites(base.spec):
        params |= {site.key(n): t for n, t in changed.init(site, base, generator, factor_A=components.get(site.name)).items()}
    return changed, params


def _directions(
    base: Base, method: LoraConfig, sites: Sequence[Site], rows: Rows, max_tokens: int
) -> tuple[Counter[str], dict[str, Tensor]]:
    """(rank of each module, its A)."""
    inputs = {s.name: base.spec.modules[s.name].in_features for s in sites}
    most = {s.name: min(round(s.rank * method.eva("rho")), inputs[s.name]) for s in sites}
    budget, forwards = sum(s.rank for s in sites), _forwards(rows, max_tokens)
    first = next(forwards)
    same = _alike(base, method, [s.name for s in sites], first)  # a module -> the one whose input is its own
    for leader in set(same.values()):
        widest = max(most[n] for n in same if same[n] == leader)
        most |= {n: widest for n in same if same[n] == leader}
    found = {n: _PCA(most[n]) for n in most if same[n] == n}
    settled, taken = dict.fromkeys(found, False), Counter(most)
    for at, examples in enumerate(_with_first(first, forwards)):
        settled = {n: bool(pca.settled[: taken[n]].all()) for n, pca in found.items()}
        if all(settled.values()):
            break
        if at == MOST_FORWARDS:
            raise _unsettled(method, found, settled)
        if int(_read_at(method, examples).sum()) < min(pca.count for n, pca in found.items() if not settled[n]):
            continue  # nothing could be told of so few
        with _reading(base, [n for n in found if not settled[n]]) as read:
            _forward(base, method, examples, partial(_fit, found, method.eva("tau")), read)
        if all(pca.components_NI is not None for pca in found.values()):
            taken = _ranks(found, same, budget)
    whiten = method.eva("whiten")
    return taken, {n: found[same[n]].factor(taken[n], whiten) for n in most}


def _unsettled(method: LoraConfig, found: Mapping[str, _PCA], settled: Mapping[str, bool]) -> ConfigError:
    few = [n for n, pca in found.items() if pca.components_NI is None]
    if few:
        wanted = found[few[0]].count
        return ConfigError(
            f"init_lora_weights = 'eva': no forward has the {wanted} supervised tokens that {few[0]} needs for as many directions",
            fix="raise batch_size, or lower r or eva_config.rho; or set eva_config.use_label_mask: false",
        )
    open_ = [n for n, done in settled.items() if not done]
    return ConfigError(
        f"init_lora_weights = 'eva': after {MOST_FORWARDS} forwards the directions of {len(open_)} modules, such as {open_[0]}, still move",
        fix=f"raise batch_size, or lower eva_config.tau ({method.eva('tau')}) or rho ({method.eva('rho')})",
    )


class _PCA:
    """The first principal components of rows that come in batches (Ross et al. 2008), by a truncated decomposition of the components so
    far, the centred batch and the correction of the mean, one below the other. settled [N]: which moved little in the last batch."""

    def __init__(self, count: int):
        self.count, self.seen = count, 0
        self.settled = torch.zeros(count, dtype=torch.bool)
        self.components_NI: Tensor | None = None
        self.values_N = self.explained_N = self.mean_I = self.variance_I = torch.empty(0, dtype=torch.float32)

    def fit(self, x_TI: Tensor, tau: float) -> None:
        """Nothing where there are fewer rows than components."""
        if len(x_TI) < self.count:
            return
        before, n, total = self.components_NI, len(x_TI), self.seen + len(x_TI)
        mean_I = x_TI.double().mean(0)
        spread_I = (x_TI.double() - mean_I).square().sum(0)
        rows = x_TI - x_TI.mean(0)
        if before is not None:
            correction = (self.seen / total * n) ** 0.5 * (self.mean_I - mean_I)
            rows = torch.cat([self.values_N[:, None] * before, rows, correction[None].to(rows.dtype)])
            spread_I += self.variance_I * self.seen + self.seen * n / total * (self.mean_I - mean_I).square()
            mean_I = (self.mean_I * self.seen + mean_I * n) / total
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            _, S, V = torch.svd_lowrank(rows, q=min(2 * self.count, *rows.shape), niter=ROUNDS)
        signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
        self.components_NI, self.values_N = (V * signs).T[: self.count], S[: self.count]
        same = spread_I.sum() <= ROUNDING * total * mean_I.square().sum()
        self.explained_N = (torch.zeros_like(S) if same else S.double().square() / spread_I.sum())[: self.count]
        self.mean_I, self.variance_I, self.seen = mean_I, spread_I / total, total
        if before is not None:
            self.settled = (torch.nn.functional.cosine_similarity(self.components_NI, before) >= tau).cpu()

    def factor(self, rank: int, whiten: bool) -> Tensor:
        """A [rank, I], fp32, on the CPU."""
        assert self.components_NI is not None
        A_NI = self.components_NI[:rank]
        return (A_NI / self.values_N[:rank].sqrt()[:, None] if whiten else A_NI).cpu().clone(memory_format=torch.contiguous_format)


def _ranks(found: Mapping[str, _PCA], same: Mapping[str, str], budget: int) -> Counter[str]:
    """The directions that explain most of their module's input, `budget` in all, counted by module. Of modules that read the same the first
    gets the most, since the directions are found for it."""
    names = [*found, *(n for n in same if same[n] != n)]
    owners = [n for n in names for _ in range(len(found[same[n]].explained_N))]
    order = torch.cat([found[same[n]].explained_N for n in names]).argsort(descending=True)
    taken = Counter(dict.fromkeys(names, 0))
    taken.update(owners[i] for i in order[:budget].tolist())
    for n in names[len(found) :]:
        leader = same[n]
        if taken[leader] < taken[n]:
            taken[leader], taken[n] = taken[n], taken[leader]
    return taken


def _alike(base: Base, method: LoraConfig, names: Sequence[str], examples: Sequence[Example]) -> dict[str, str]:
    """Each module -> the first one that reads the same."""
    first: dict[Any, str] = {}
    same = dict[str, str]()

    def note(name: str, x_TI: Tensor) -> None:
        same[name] = first.setdefault((x_TI.shape, x_TI.cpu().view(torch.uint8).numpy().tobytes()), name)

    with _reading(base, names) as read:
        _forward(base, method, examples, note, read)
    return {n: same[n] for n in names}


def _fit(found: Mapping[str, _PCA], tau: float, name: str, x_TI: Tensor) -> None:
    found[name].fit(x_TI, tau)


@contextmanager
def _reading(base: Base, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """While this lasts, what is put under "to" of the given dict is called with each module's name and input [T, I]. "head": whether the
    output head is among them."""
    read: dict[str, Any] = {"head": base.spec.head in names}
    modules = [(n, base.model.get_submodule(n)) for n in names]

    def hook(name: str, module: Any, args: tuple[Tensor, ...]) -> None:
        read["to"](name, args[0].detach().flatten(0, -2))

    handles = [m.register_forward_pre_hook(partial(hook, n)) for n, m in modules]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _read_at(method: LoraConfig, examples: Sequence[Example]) -> Tensor:
    """At which tokens of these rows inputs are read, bool [T]: the supervised ones, or all where there are none."""
    supervised = torch.cat([torch.from_numpy(s.supervised.copy()) for e in examples for s in e.segments])
    return supervised if method.eva("use_label_mask") and bool(supervised.any()) else torch.ones_like(supervised)


@torch.no_grad()
def _forward(base: Base, method: LoraConfig, examples: Sequence[Example], to: Any, read: dict[str, Any]) -> None:
    """The base on some rows; `to` hears the inputs at the tokens where they are read, in fp32."""
    wanted = _read_at(method, examples).to(base.device)
    everywhere = bool(wanted.all())
    read["to"] = lambda name, x_TI: to(name, (x_TI if everywhere else x_TI[wanted]).float())
    pieces = [Piece(torch.from_numpy(s.ids.astype("int64"))) for e in examples for s in e.segments]
    hidden_TH = base.attached.forward(base.batch(pieces, Mix([])))
    if read["head"]:  # it reads these, and need not run
        read["to"](base.spec.head, hidden_TH)


def _forwards(rows: Rows, max_tokens: int) -> Iterator[list[Example]]:
    """The variant's batches in its own order, cut where a forward would have more tokens."""
    while True:
        part, size = list[Example](), 0
        for example in rows.take():
            tokens = sum(len(s.ids) for s in example.segments)
            if part and size + tokens > max_tokens:
                yield part
                part, size = [], 0
            part.append(example)
            size += tokens
        yield part


def _with_first(first: list[Example], others: Iterator[list[Example]]) -> Iterator[list[Example]]:
    yield first
    yield from others
