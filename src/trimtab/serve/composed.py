"""Several adapters with scales as one: a request names them, and they are summed when they are loaded.

    y = W x + b + Σ cᵢ ΔWᵢ x

ΔWᵢ is what merging adapter i adds to a weight: s B A for LoRA (the sum is peft's "cat" of `add_weighted_adapter`), W ∘ (l - 1) for IA³, so
that l = 1 + Σ cᵢ (lᵢ - 1). Where the scales add up to 1, peft's `add_weighted_adapter` makes the same of IA³; otherwise its Σ cᵢ lᵢ would
scale the base as well. The sum is an adapter like any other to the engine: packed once, in mixed batches, under a digest of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import AdapterError, TrimtabError
from trimtab.serve.served import Served, served
from trimtab.store.registry import Store

if TYPE_CHECKING:
    from trimtab.methods import Head
    from trimtab.model import Base
    from trimtab.store import Adapter

MAX_PARTS, MAX_SCALE = 8, 100.0
MAX_REF = 64
"""Characters of an adapter's name in that of a sum."""
_SCALED = re.compile(r"(-?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?)\*([^*]+)", re.ASCII)


@dataclass(frozen=True)
class Composed:
    """Two adapters or more, each once, in the order of their digests; or one with a scale other than 1. digest: names the parts, so that it
    means the same tensors for ever."""

    parts: tuple[tuple[Served, float], ...]

    @property
    def digest(self) -> str:
        return "+".join(f"{scale!r}*{part.digest}" for part, scale in self.parts)

    @property
    def ref(self) -> str:
        """Short: it goes into headers, where a path for each part would be more than proxies take."""
        names = [(_shortened(part.ref), scale) for part, scale in self.parts]
        return "+".join(name if scale == 1 else f"{scale:g}*{name}" for name, scale in names)

    @property
    def head(self) -> Head | None:
        """None: adapters with a head have no sum, as `load` says."""
        return None

    def load(self) -> Adapter:
        """AdapterError if a part cannot be read; TrimtabError, which is the request's mistake, if it has no sum with the others."""
        from trimtab.store.combine import summed

        loaded = [part.load() for part, _ in self.parts]
        try:
            return summed(loaded, [scale for _, scale in self.parts])
        except AdapterError as error:
            raise TrimtabError(f"{self.ref} cannot be composed: {error.message}", problems=error.problems) from error


def composed(parts: Iterable[tuple[Served, float]]) -> Served | None:
    """What these adapters are together: None for the base where all scales are 0, an adapter itself where it is alone with scale 1. An
    adapter that is named twice has the sum of its scales."""
    found: dict[str, tuple[Served, float]] = {}
    for part, scale in (one for given in parts for one in _opened(*given)):
        found[part.digest] = (part, scale + (found[part.digest][1] if part.digest in found else 0.0))
    kept = tuple(found[digest] for digest in sorted(found) if found[digest][1] != 0)
    check([(part.ref, scale) for part, scale in kept])
    if not kept:
        return None
    return kept[0][0] if len(kept) == 1 and kept[0][1] == 1 else Composed(kept)


def _opened(part: Served, scale: float) -> Iterable[tuple[Served, float]]:
    """A composition that is part of another as its own parts."""
    return [(own, scale * by) for own, by in part.parts] if isinstance(part, Composed) else [(part, scale)]


def names_in(model: str) -> list[tuple[str, float]] | None:
    """The names and scales of "name+0.5*other"; None where a text is no sum. TrimtabError where it is one that cannot be."""
    if "+" not in model and "*" not in model:
        return None
    terms = [term.strip() for term in model.split("+")]
    scaled = [(m[2].strip(), float(m[1])) if (m := _SCALED.fullmatch(term)) else (term, 1.0) for term in terms]
    if scaled[0] == (model.strip(), 1.0) or not all(name for name, _ in scaled):
        return None
    check(scaled)
    return scaled


def served_sum(source: str, base: Base, store: str | Path | Store | None = None) -> Served | None:
    """The adapter, or the sum, that a text means: folders' paths and names in the store. AdapterError if there is none."""
    parts = None if Path(source).is_dir() else names_in(source)
    return served(source, base, store) if parts is None else composed((served(name, base, store), scale) for name, scale in parts)


def check(parts: Sequence[tuple[str, float]]) -> None:
    """TrimtabError unless an answer may have so many parts with such scales."""
    problems = [f"the scale of {name[:80]!r} is {scale:g}: a number from -100 to 100" for name, scale in parts if not _fits(scale)]
    problems += [f"{len(parts)} adapters: at most {MAX_PARTS}"] if len(parts) > MAX_PARTS else []
    if problems:
        raise TrimtabError("these adapters cannot be composed", problems=problems)


def parts_of(digest: str) -> frozenset[str]:
    """The digests of the adapters that the one of this digest was made of, or its own."""
    return frozenset(part.rpartition("*")[2] for part in digest.split("+"))


def usage_of(digest: str) -> str:
    """Under which name the use of an adapter is counted: of a sum its parts, whatever their scales. Whoever counts has a row for each name,
    and of scales there is no end."""
    return "+".join(sorted(parts_of(digest)))


def base_is_no_part(name: str) -> TrimtabError:
    return AdapterError(f"{name!r} is the base, which every composition contains", fix="name adapters alone, each with its scale")


def _shortened(ref: str) -> str:
    """Its end, where it is a long path: that tells folders apart."""
    return ref if len(ref) <= MAX_REF else f"...{ref[3 - MAX_REF :]}"


def _fits(scale: float) -> bool:
    return math.isfinite(scale) and abs(scale) <= MAX_SCALE
