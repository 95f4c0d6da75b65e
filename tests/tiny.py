"""Tiny random models of every family and a byte-level tokenizer, made in the test: nothing is downloaded.

Weights have a spread of 0.2 so that logits differ clearly; biases and norms are random too, so that nothing is right by being zero or one.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 300  # 256 bytes, 4 special tokens, and ids that no text has
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
EOS_ID, PAD_ID = 258, 259
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON = {
    "vocab_size": VOCAB,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "initializer_range": 0.2,
}
_LLAMA_LIKE = _COMMON | {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_GEMMA_LIKE = _LLAMA_LIKE | {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_MOE_LIKE = _LLAMA_LIKE | {"num_experts_per_tok": 2}
_MLA = {"q_lora_rank": 32, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "num_key_value_heads": 4}
_WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_OF_LAYERS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
_MIMO = {"v_head_dim": 12}
_GEMMA_4 = {"global_head_dim": 32, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 5.0}
# transformers' model type, with "-variant" where there are two -> its config. Windows and soft caps matter within a few tokens.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE | {"tie_word_embeddings": True},
    "qwen3": _LLAMA_LIKE | {"head_dim": 16},
    "mistral": _LLAMA_LIKE | {"sliding_window": 8},
    "gemma2": _GEMMA_LIKE | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "gpt2": (
        _COMMON | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512} | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    ),
}

# More families: each is compared with transformers and peft in tests/bases/test_families.py, but does not run through all laws.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "smollm3": _LLAMA_LIKE | {"no_rope_layers": [1, 0]},
    "ministral": _LLAMA_LIKE | {"sliding_window": 8, "head_dim": 12},
    "ministral3": _LLAMA_LIKE | {"head_dim": 12},
    "mixtral": _MOE_LIKE | {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": _MOE_LIKE | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40},
    "qwen3_moe": _MOE_LIKE | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "gemma": _LLAMA_LIKE | {"head_dim": 16},
    "phi": _LLAMA_LIKE | {"hidden_size": 64},
    "phimoe": _MOE_LIKE | {"num_local_experts": 4, "sliding_window": 512},
    "gptj": _COMMON | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
    "gpt_neox": _LLAMA_LIKE | {"hidden_size": 64},
    "gpt_bigcode": _COMMON | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "falcon": (
        _COMMON
        | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_kv_heads": 2, "new_decoder_architecture": True}
    ),
    "falcon-7b": _COMMON | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "starcoder2": _LLAMA_LIKE | {"sliding_window": 8},
    "stablelm": _LLAMA_LIKE | {"hidden_size": 64},
    "persimmon": _LLAMA_LIKE | {"hidden_size": 64},
    "olmo": _LLAMA_LIKE | {"clip_qkv": 0.5},
    "olmo2": _LLAMA_LIKE,
    "olmo3": _LLAMA_LIKE | _WINDOWED,
    "olmoe": _MOE_LIKE | {"num_experts": 4},
    "granite": _LLAMA_LIKE | {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.4},
    "granitemoe": _MOE_LIKE | {"num_local_experts": 4, "logits_scaling": 3.0},
    "cohere": _LLAMA_LIKE | {"use_qk_norm": True},
    "cohere2": _LLAMA_LIKE | _WINDOWED,
    "glm": _LLAMA_LIKE | {"head_dim": 16},
    "glm4": _LLAMA_LIKE | {"head_dim": 16},
    "glm4_moe": (
        _MOE_LIKE
        | {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"head_dim": 16}
    ),
    "lfm2": _LLAMA_LIKE | {"layer_types": ["full_attention"] * 2},
    "apertus": _LLAMA_LIKE,
    "arcee": _LLAMA_LIKE,
    "seed_oss": _LLAMA_LIKE | {"head_dim": 16},
    "nemotron": _LLAMA_LIKE | {"head_dim": 12},
    "exaone4": _LLAMA_LIKE | _WINDOWED,
    "hunyuan_v1_dense": _LLAMA_LIKE | {"head_dim": 12},
    "ernie4_5": _LLAMA_LIKE | {"head_dim": 12},
    "gpt_oss": _MOE_LIKE | _WINDOWED | {"num_local_experts": 4, "head_dim": 16},
    "granitemoehybrid": (
        _LLAMA_LIKE
        | {"layer_types": ["full_attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 96}
        | {"hidden_size": 64, "position_embedding_type": "rope", "logits_scaling": 3.0}
    ),
    "granite_swa": _LLAMA_LIKE | {"logits_scaling": 3.0},
    "lfm2_moe": _MOE_LIKE | {"layer_types": ["full_attention"] * 2, "num_dense_layers": 1, "num_experts": 4, "moe_intermediate_size": 32},
    "dots1": (
        _MOE_LIKE
        | {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1, "head_dim": 16}
    ),
    "ernie4_5_moe": _MOE_LIKE | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "hunyuan_v1_moe": _MOE_LIKE | {"num_experts": 4, "moe_topk": 2, "head_dim": 12},
    "flex_olmo": _MOE_LIKE | {"num_experts": 4},
    "minimax_m2": _MOE_LIKE | {"num_local_experts": 4, "head_dim": 16, "rotary_dim": 8},
    "helium": _LLAMA_LIKE | {"head_dim": 12},
    "afmoe": _MOE_LIKE | _WINDOWED | {"num_experts": 4, "num_dense_layers": 1, "moe_intermediate_size": 32, "head_dim": 16},
    "hyperclovax": _LLAMA_LIKE | {"logits_scaling": 3.0},
    "opt": _COMMON | {"hidden_size": 48, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4} | {"word_embed_proj_dim": 48},
    "biogpt": _LLAMA_LIKE,
    "granitemoeshared": _MOE_LIKE | {"num_local_experts": 4, "shared_intermediate_size": 80, "logits_scaling": 3.0},
    "deepseek_v2": (
        _MOE_LIKE
        | _MLA
        | {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
        | {"first_k_dense_replace": 1, "head_dim": 8}
    ),
    "deepseek_v3": (
        _MOE_LIKE
        | _MLA
        | {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1, "head_dim": 8}
    ),
    "glm4_moe_lite": (
        _MOE_LIKE
        | _MLA
        | {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1, "head_dim": 8}
    ),
    "minicpm3": _LLAMA_LIKE | _MLA | {"head_dim": 8},
    "mimo_v2_flash": (
        _MOE_LIKE | _WINDOWED | {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "head_dim": 16} | _MIMO
    ),
    "gemma4_text": _GEMMA_LIKE | _GEMMA_4,
    "gemma4_text-layers": _GEMMA_LIKE | _GEMMA_4 | {"num_kv_shared_layers": 2} | _OF_LAYERS,
    "gemma3n_text": (
        _GEMMA_LIKE
        | {"num_kv_shared_layers": 2, "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}
        | {"laurel_rank": 8}
        | _OF_LAYERS
    ),
    "gemma4_text-moe": (
        _GEMMA_LIKE
        | _GEMMA_4
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "attention_k_eq_v": True}
        | {"num_global_key_value_heads": 1, "use_bidirectional_attention": "vision"}
    ),
    "exaone_moe": (
        _MOE_LIKE
        | {"num_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16}
        | {"is_moe_layer": [False, True]}
    ),
    "cohere2_moe": _MOE_LIKE | _WINDOWED | {"num_experts": 4, "head_dim": 12},
    "internlm3": _LLAMA_LIKE | {"head_dim": 12},
    "jais2": _LLAMA_LIKE | {"head_dim": 12},
    "vaultgemma": _GEMMA_LIKE | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "nanochat": _LLAMA_LIKE,
    "hy_v3": _MOE_LIKE | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "solar_open": (
        _MOE_LIKE
        | {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"head_dim": 16}
    ),
    "granitemoe_swa": _MOE_LIKE | {"num_local_experts": 4, "logits_scaling": 3.0},
    "laguna": _MOE_LIKE | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "mellum": _MOE_LIKE | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "minimax_m3_vl_text": _MOE_LIKE | {"num_local_experts": 4, "head_dim": 16, "rotary_dim": 8},
    "youtu": _LLAMA_LIKE | _MLA | {"head_dim": 8},
    "aria_text": _LLAMA_LIKE | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "cwm": _LLAMA_LIKE | {"bos_token_id": 1, "head_dim": 12},
    "phi3-longrope": (
        _LLAMA_LIKE
        | {"original_max_position_embeddings": 256}
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
                "original_max_position_embeddings": 256,
            }
        }
    ),
}


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random causal LM of `family`, in eval mode, the same for the same seed. Leaves torch's global generator as it found it."""
    config = AutoConfig.for_model(family.partition("-")[0], **(FAMILIES | MORE_FAMILIES)[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM._model_mapping[type(config)](config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name or "ln_" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
    for parameter in model.parameters():  # not `model.to`: rotary frequencies stay fp32, as in a model that transformers loads
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ids 0 to 255, then `SPECIALS`; ChatML template, eos `<|im_end|>`, a pad of its own, no bos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", model_max_length=512, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_folder(path: Path, family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny model and the tiny tokenizer into `path` as a base's folder; returns `path`."""
    tiny_model(family, seed=seed, dtype=dtype).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@cache
def bundled_base(dtype: str | None = None) -> Any:
    """The bundled base (a `LoadedBase`, one a session and dtype: do not change it). Skips only where its weight file cannot be had."""
    from trimtab.bases import load
    from trimtab.bases.bundled import find_gguf
    from trimtab.errors import BaseError

    try:
        return load("smollm2-135m-instruct", dtype=dtype, device="cpu", progress=lambda message: None)
    except BaseError as error:
        if find_gguf() is None:
            pytest.skip(f"the bundled base's weights cannot be had: {error.message}")
        raise
