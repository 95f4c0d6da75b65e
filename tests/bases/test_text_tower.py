"""Multimodal folders: the text tower alone is loaded, computes what the whole model computes of text, trains, and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import trimtab
from tests.laws.common import difference, noisy, one_thread, tokens
from tests.tiny import FAMILIES, MORE_FAMILIES, tiny_tokenizer
from trimtab.bases.shapes import read_architecture
from trimtab.errors import BaseError
from trimtab.methods import LoraConfig

__all__ = ["one_thread"]
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
SEES = {"depth": 1, "num_heads": 2, "intermediate_size": 24, "patch_size": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OF_THREE: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"model_type": "qwen2_vl_text", "rope_parameters": ROPE | {"mrope_section": [2, 2, 2]}, "tie_word_embeddings": False},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl_text", "rope_parameters": ROPE | {"mrope_section": [2, 1, 3]}, "tie_word_embeddings": False},
    "qwen3_vl": {
        "model_type": "qwen3_vl_text",
        "rope_parameters": ROPE | {"rope_theta": 1e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
    "glm4v": {
        "model_type": "glm4v_text",
        "attention_bias": False,  # its class has them whatever the config says
        "head_dim": 12,
        "rope_parameters": ROPE | {"partial_rotary_factor": 1 / 3, "mrope_section": [1, 1, 0]},
    },
    "glm4v_moe": {"model_type": "glm4v_moe_text", "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
}
"""Towers that place a token by three numbers: they are loaded as the family that computes the same of text."""
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"vision_config": VISION | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4}),
    "mistral3": ("mistral", {"vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}, "tie_word_embeddings": False}),
    "llava": ("qwen2", {"vision_config": VISION | {"model_type": "siglip_vision_model"}, "image_token_index": 9}),
    "idefics3": ("llama", {"vision_config": VISION | {"model_type": "idefics3_vision"}, "scale_factor": 2}),
    "voxtral": ("llama", {"audio_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}}),
    "qwen2_audio": (
        "llama",
        {"audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8}},
    ),
    "minimax_m3_vl": ("minimax_m3_vl_text", {"vision_config": VISION, "projector_hidden_size": 24}),
    "kimi_k25": ("deepseek_v3", {"vision_config": VISION | {"projection_hidden_size": 48}}),
    "qwen2_vl": ("qwen2", {"vision_config": SEES | {"embed_dim": 16, "hidden_size": 48, "mlp_ratio": 2}}),
    "qwen2_5_vl": ("qwen2", {"vision_config": SEES | {"hidden_size": 16, "out_hidden_size": 48, "fullatt_block_indexes": [0]}}),
    "qwen3_vl": ("qwen3", {"vision_config": SEES | {"hidden_size": 16, "out_hidden_size": 48, "deepstack_visual_indexes": [0]}}),
    "glm4v": ("glm4", {"vision_config": SEES | {"hidden_size": 16, "out_hidden_size": 48, "image_size": 16}}),
    "glm4v_moe": ("glm4_moe", {"vision_config": SEES | {"hidden_size": 16, "out_hidden_size": 48, "image_size": 16}}),
}


def write_whole(family: str, folder: Path) -> Any:
    """A tiny random multimodal model, and its folder as transformers writes it."""
    text, rest = WHOLE[family]
    own = (FAMILIES | MORE_FAMILIES)[text] | {"model_type": text} | OF_THREE.get(family, {})
    config = transformers.AutoConfig.for_model(family, text_config=own, **rest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hears = family in ("voxtral", "qwen2_audio", "granite_speech")
        kind = transformers.AutoModelForMultimodalLM if hears else transformers.AutoModelForImageTextToText
        model = kind.from_config(config).float().eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, float("norm" in name), 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("names", ["new", "old", "as of text"])
@pytest.mark.parametrize("family", WHOLE)
def test_a_text_tower_computes_what_the_whole_model_computes_of_text(family: str, names: str, tmp_path: Path) -> None:
    """Also under the names of older folders: LLaVA's, and Qwen2-VL's, which has those of a model of text."""
    model = write_whole(family, tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    stored = {n.replace("language_model.model.", "model.language_model."): t for n, t in load_file(file).items()}
    stored = {
        n.replace("language_model.blocks.", "language_model.layers."): t for n, t in stored.items()
    }  # so Kimi is saved, not published
    if names == "old":
        stored = {
            n.replace("model.language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head."): t
            for n, t in stored.items()
        }
    elif names == "as of text":
        stored = {n.replace("model.language_model.", "model."): t for n, t in stored.items()}
    save_file({n.replace("language_model.language_model", "language_model"): t for n, t in stored.items()}, file, {"format": "pt"})
    base = trimtab.load_base(str(tmp_path / "whole"), dtype="float32", device="cpu")
    assert base.spec.model_type == WHOLE[family][0] and not any("vision" in name for name in base.spec.modules)
    ids = tokens(21, 1)
    assert difference(base.logits([ids])[0], model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]) <= 1e-5
    assert read_architecture(str(tmp_path / "whole")).parameters == base.spec.num_parameters


def test_what_is_merged_into_a_text_tower_is_a_base_of_text(tmp_path: Path) -> None:
    write_whole("gemma3", tmp_path / "whole")
    base = trimtab.load_base(str(tmp_path / "whole"), dtype="float32", device="cpu")
    adapter, ids = noisy(base, LoraConfig(r=2)), tokens(9, 1)
    adapter.merge_into(tmp_path / "merged")
    merged = trimtab.load_base(str(tmp_path / "merged"), dtype="float32", device="cpu")
    assert merged.model.config.model_type == "gemma3_text"
    assert difference(merged.logits([ids])[0], base.logits([ids], [adapter])[0]) < 1e-4


def test_a_tower_without_a_causal_language_model_is_refused_by_name(tmp_path: Path) -> None:
    for family, words in [
        ("qwen2_5_omni_thinker", "of which transformers has no causal language model"),
        ("paligemma", "in both directions"),
    ]:
        transformers.AutoConfig.for_model(family).save_pretrained(tmp_path / family)
        with pytest.raises(BaseError, match=f"{family}.*{words}"):
            read_architecture(str(tmp_path / family))


@torch.no_grad()
@pytest.mark.parametrize(("family", "text", "scale"), [("aya_vision", "cohere2", 0.3), ("granite_speech", "granite", 1 / 3)])
def test_a_tower_scales_its_logits_though_the_whole_model_of_transformers_leaves_that_out(
    family: str, text: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the tower's own class, with which it was trained."""
    monkeypatch.setitem(MORE_FAMILIES, "cohere2", MORE_FAMILIES["cohere2"] | {"logit_scale": scale})
    parts = {
        "aya_vision": {"vision_config": VISION | {"model_type": "siglip_vision_model"}},
        "granite_speech": {
            "encoder_config": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "dim_head": 8, "output_dim": 16},
            "projector_config": {"model_type": "blip_2_qformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
    }
    monkeypatch.setitem(WHOLE, family, (text, parts[family]))
    model, ids = write_whole(family, tmp_path / "whole"), tokens(21, 1)
    base = trimtab.load_base(str(tmp_path / "whole"), dtype="float32", device="cpu")
    assert difference(base.logits([ids])[0], scale * model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]) <= 1e-5
