"""Fields with which clients of other servers ask for something that changes the answer, and that this server does not do.

A body takes fields that it does not know, and names them in x-trimtab-ignored. These are known: to leave one out would give another answer
than was asked for, or that of another adapter. So they are refused in every route, unless they have a value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.http.errors import Fault
from trimtab.http.fields import Body, Off, off

_ADAPTER = off(why="names an adapter; name it in model, or in adapters")
_LENGTH = off(-1, why="is max_tokens here, and in /v1/responses max_output_tokens")

FOREIGN: Mapping[str, Off] = {
    **dict.fromkeys(("lora_path", "lora", "lora_name", "lora_request", "adapter_id", "merged_adapters"), _ADAPTER),
    **dict.fromkeys(("n_predict", "num_predict", "max_new_tokens"), _LENGTH),
    "min_new_tokens": off(0, why="is min_tokens here"),
    "random_seed": off(why="is seed here"),
    "truncation_side": off("left", why="is not supported by this server: the end of a prompt is kept"),
    **dict.fromkeys(("include_reasoning", "separate_reasoning"), Off((None, True), "cannot be turned off; leave it out")),
    **dict.fromkeys(("logprob_token_ids", "repetition_detection", "vllm_xargs", "watermarking"), off(0)),  # vLLM's
    **dict.fromkeys(("stop_regex", "session_params", "custom_logit_processor", "watermark"), off(0)),  # SGLang's
    **dict.fromkeys(("input_ids", "return_hidden_states", "embed_overrides"), off()),
    # and of llama.cpp's kin
    **dict.fromkeys(("samplers", "smoothing_factor", "dynatemp_range", "epsilon_cutoff", "eta_cutoff"), off(0)),
    **dict.fromkeys(("thinking_token_budget", "thinking_budget_tokens", "top_n_sigma"), off(-1)),
    "guidance_scale": off(1),
    "negative_prompt": off(),
}


def refuse_foreign(body: Body) -> None:
    """Fault (400) where a body has one of them, which names them all."""
    given = (body.model_extra or {}).items()
    found = {name: FOREIGN[name].why for name, value in given if name in FOREIGN and not FOREIGN[name].takes(value)}
    if found:
        raise Fault("; ".join(f"{name}: {why}" for name, why in found.items()), param=next(iter(found)), code="invalid_value")
