"""Fields with which clients of other servers ask for something that changes the answer, and that this server does not do.

A body takes fields that it does not know, and names them in x-trimtab-ignored. These are known: to leave one out would give another answer
than was asked for, or that of another adapter. So they are refused in every route, unless they have a value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.http.errors import Fault
from trimtab.http.fields import Body, Off, off

_ADAPTER = "names an adapter; name it in model, or in adapters"
_LENGTH = "is max_tokens here"
_OTHER = "is not supported by this server; leave it out"

FOREIGN: Mapping[str, tuple[Off, str]] = {
    **dict.fromkeys(("lora_path", "lora", "lora_name", "lora_request", "adapter_id", "merged_adapters"), (off(), _ADAPTER)),
    **dict.fromkeys(("n_predict", "num_predict", "max_new_tokens"), (off(-1), _LENGTH)),
    "min_new_tokens": (off(0), "is min_tokens here"),
    "random_seed": (off(), "is seed here"),
    "truncation_side": (off("left"), "is not supported by this server: the end of a prompt is kept"),
    **dict.fromkeys(("include_reasoning", "separate_reasoning"), (Off((None, True)), "cannot be turned off; leave it out")),
    **dict.fromkeys(("logprob_token_ids", "repetition_detection", "vllm_xargs", "watermarking"), (off(0), _OTHER)),  # vLLM's
    **dict.fromkeys(("stop_regex", "session_params", "custom_logit_processor", "watermark"), (off(0), _OTHER)),  # SGLang's
    **dict.fromkeys(("input_ids", "return_hidden_states", "embed_overrides"), (off(), _OTHER)),
    # and of llama.cpp's kin
    **dict.fromkeys(("samplers", "smoothing_factor", "dynatemp_range", "epsilon_cutoff", "eta_cutoff"), (off(0), _OTHER)),
    **dict.fromkeys(("thinking_token_budget", "thinking_budget_tokens", "top_n_sigma"), (off(-1), _OTHER)),
    "guidance_scale": (off(1), _OTHER),
    "negative_prompt": (off(), _OTHER),
}


def refuse_foreign(body: Body) -> None:
    """Fault (400) where a body has one of them, which names them all."""
    found = {
        name: FOREIGN[name][1] for name, value in (body.model_extra or {}).items() if name in FOREIGN and not FOREIGN[name][0].takes(value)
    }
    if found:
        raise Fault("; ".join(f"{name}: {why}" for name, why in found.items()), param=next(iter(found)), code="invalid_value")
