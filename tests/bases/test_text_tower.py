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
from tests.tiny import FAMILIES, tiny_tokenizer
from trimtab.bases.shapes import read_architecture
from trimtab.errors import BaseError
from trimtab.methods import LoraConfig

__all__ = ["one_thread"]
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"vision_config": VISION | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4}),
    "mistral3": ("mistral", {"vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}, "tie_word_embeddings": False}),
    "llava": ("qwen2", {"vision_config": VISION | {"model_type": "siglip_vision_model"}, "image_token_index": 9}),
}


def write_whole(family: str, folder: Path) -> Any:
    """A tiny random multimodal model, and its folder as transformers writes it."""
    text, rest = WHOLE[family]
    config = transformers.AutoConfig.for_model(family, text_config=FAMILIES[text] | {"model_type": text}, **rest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("names", ["new", "old"])
@pytest.mark.parametrize("family", WHOLE)
def test_a_text_tower_computes_what_the_whole_model_computes_of_text(family: str, names: str, tmp_path: Path) -> None:
    model = write_whole(family, tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    stored = {n.replace("language_model.model.", "model.language_model."): t for n, t in load_file(file).items()}
    if names == "old":
        stored = {
            n.replace("model.language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head."): t
            for n, t in stored.items()
        }
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
    for family, words in [("qwen2_vl", "of which transformers has no causal language model"), ("paligemma", "in both directions")]:
        transformers.AutoConfig.for_model(family).save_pretrained(tmp_path / family)
        with pytest.raises(BaseError, match=f"{family}.*{words}"):
            read_architecture(str(tmp_path / family))
