"""Names of tensors that peft, its trainers or torch wrote otherwise than peft does today, and what peft 0.21 calls them.

Taken away is what stands around a tensor's own name and says nothing of it: the adapter's name (`lora_A.default.weight`), wrappers
(`_orig_mod.`, `_fsdp_wrapped_module.`, `module.`, `modules_to_save.default.`), a `base_model.model.` that is missing or there twice, a
`model.` too few or too many. Nothing is guessed: a name that means no module of the base afterwards stays, and is refused as left over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from trimtab.bases.spec import Spec
from trimtab.methods.head import NAMES
from trimtab.store.files import Refusal
from trimtab.store.tensors import PREFIX

PROMPT = "prompt_embeddings"
OWN = r"lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l"
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Parts of a name that DataParallel, torch.compile, FSDP, activation checkpointing and DeepSpeed add anywhere in it."""
ROOTS = frozenset({"base_model", "model"})
"""Parts that stand before all others, once for each model around the layers."""
_NAMED = re.compile(rf"\.({OWN})\.(?!weight$)([^.]+)(?=$|\.weight$)")
_SAVED = re.compile(r"\.modules_to_save\.([^.]+)\.(?=(?:weight|bias)$)")
_PROMPT = re.compile(r"(?:.*\.)?prompt_encoder\.([^.]+)\.embedding\.weight")


def todays_names(names: Iterable[str], spec: Spec | None = None) -> dict[str, str]:
    """Every tensor's name in the file -> its name in peft's files of today. spec: of the base, so that its roots are known.

    Refusal if the file holds several adapters, or two names are one.
    """
    names, roots = list(names), _roots(spec) if spec is not None else {}
    adapters = sorted({match[match.lastindex or 0] for n in names for p in (_NAMED, _SAVED, _PROMPT) if (match := p.search(n))})
    if len(adapters) > 1:
        raise Refusal(f"it holds several adapters: {', '.join(adapters[:8])}: save each into a folder of its own")
    found = {n: modern(n, roots) for n in names}
    if len(set(found.values())) < len(found):
        seen: dict[str, str] = {}
        twins = [f"{n} and {seen[new]} are both {new}" for n, new in found.items() if seen.setdefault(new, n) != n]
        raise Refusal("\n".join(twins[:8]))
    return found


def modern(name: str, roots: dict[str, str] | None = None) -> str:
    """A tensor's name as peft 0.21 writes it. roots: first part of a module's name behind ROOTS -> the roots that the base has there."""
    if name == PROMPT or _PROMPT.fullmatch(name):
        return PROMPT
    name = _NAMED.sub(r".\1", name)
    name = re.sub(r"\.(lora_embedding_[AB]|lora_magnitude_vector|ia3_l)\.weight$", r".\1", name)
    name = _SAVED.sub(".", name).replace(".original_module.", ".base_layer.")
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    first, rest = _split(name)
    if roots and first in roots:
        return PREFIX + roots[first] + rest
    return name if name.startswith(PREFIX) else PREFIX + name


def renaming(found: dict[str, str]) -> list[str]:
    """What a user is told of names that were not today's: one line, or none."""
    changed = [(old, new) for old, new in found.items() if old != new]
    if not changed:
        return []
    return [
        f"{len(changed)} of {len(found)} tensors do not have the names that peft writes today: {changed[0][0]} is read as {changed[0][1]}"
    ]


def _roots(spec: Spec) -> dict[str, str]:
    """First part of each module's name behind ROOTS -> what stands before it in this base: "layers" -> "model."; nothing before heads."""
    found: dict[str, str] = dict.fromkeys(NAMES, "")
    for module in spec.modules:
        first, rest = _split(module)
        found[first] = module.removesuffix(rest)
    return found


def _split(name: str) -> tuple[str, str]:
    """(first part behind all ROOTS, the name from there on)."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part not in ROOTS), len(parts) - 1)
    return parts[at], ".".join(parts[at:])
