"""Prompt tuning: soft prompts (Lester, Al-Rfou and Constant 2021, arXiv:2104.08691).

    the base reads [P; E[t_0], E[t_1], …]        P [N, H] learned, real tokens at positions N, N+1, …

P's keys and values do not depend on the tokens after it, so this is a prefix that the base computes from P: once for each adapter and
step in training, once for each load in serving. P starts as embeddings of random vocabulary entries ("SAMPLE_VOCAB"), of a text ("TEXT"),
or normal(0, 1) ("RANDOM").
Dimensions: N virtual tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.bases.spec import Spec
from trimtab.errors import ConfigError, nearest
from trimtab.methods.base import BaseView, Method, Params, Prefix, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INITS = ("SAMPLE_VOCAB", "TEXT", "RANDOM")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(Method):
    """num_virtual_tokens: N, the embeddings before each sequence. prompt_tuning_init: SAMPLE_VOCAB, TEXT or RANDOM.
    prompt_tuning_init_text: the text of TEXT, repeated or cut to N tokens."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    name: ClassVar[str] = "prompt"
    preset_lr: ClassVar[float] = 0.5
    mergeable: ClassVar[bool] = False
    in_peft: ClassVar[bool] = True

    num_virtual_tokens: int = 50
    prompt_tuning_init: str = "SAMPLE_VOCAB"
    prompt_tuning_init_text: str | None = None

    def problems(self) -> list[str]:
        found = []
        if self.num_virtual_tokens < 1:
            found.append(f"num_virtual_tokens = {self.num_virtual_tokens}: must be at least 1")
        if self.prompt_tuning_init not in INITS:
            found.append(
                f"prompt_tuning_init = {self.prompt_tuning_init!r}{nearest(self.prompt_tuning_init, INITS)}: one of {', '.join(INITS)}"
            )
        if self.prompt_tuning_init == "TEXT" and not (self.prompt_tuning_init_text or "").strip():
            found.append("prompt_tuning_init = 'TEXT' needs prompt_tuning_init_text")
        return found

    @classmethod
    def examples(cls) -> list[Method]:
        return [cls(num_virtual_tokens=5), cls(num_virtual_tokens=3, prompt_tuning_init="RANDOM")]

    @property
    def fresh_is_base(self) -> bool:
        return False

    def sites(self, spec: Spec) -> list[Site]:
        room_for(self.num_virtual_tokens, spec)
        if spec.layer_embeddings:
            raise ConfigError(
                f"each layer of this {spec.model_type} base has embeddings of the tokens of its own, which virtual tokens do not have",
                fix="use LoRA",
            )
        if not spec.layers_alike:
            raise ConfigError(
                f"the layers of this {spec.model_type} base keep keys and values of different shapes; those of virtual tokens are kept in "
                "one for all",
                fix="use LoRA",
            )
        return [Site("", {"prompt_embeddings": (self.num_virtual_tokens, spec.hidden_size)})]

    def init(self, site: Site, base: BaseView, generator: torch.Generator) -> dict[str, Tensor]:
        import torch

        n = self.num_virtual_tokens
        if self.prompt_tuning_init == "RANDOM":
            return {"prompt_embeddings": torch.randn(site.shapes["prompt_embeddings"], dtype=torch.float32, generator=generator)}
        if self.prompt_tuning_init == "TEXT":
            ids = fit(base.encode(self.prompt_tuning_init_text or ""), n, "prompt_tuning_init_text")
        else:
            ids = torch.randint(base.spec.vocab_size, (n,), generator=generator).tolist()
        return {"prompt_embeddings": base.embed(ids).float().clone()}

    def prefix(self, spec: Spec, params: Params, dtype: torch.dtype) -> Prefix:
        return Prefix(self.num_virtual_tokens, embeds_NH=params["prompt_embeddings"].to(dtype))


def fit(ids: list[int], length: int, option: str) -> list[int]:
    """Repeat or cut `ids` to `length` tokens, as peft does."""
    if not ids:
        raise ConfigError(f"{option} has no tokens")
    return (ids * (length // len(ids) + 1))[:length]


def room_for(virtual_tokens: int, spec: Spec) -> None:
    """ConfigError if the virtual tokens leave no position for a real one."""
    if virtual_tokens >= spec.max_positions:
        raise ConfigError(
            f"num_virtual_tokens = {virtual_tokens}: this base has {spec.max_positions} positions, and real tokens need some of them"
        )
