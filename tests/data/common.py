"""Files, tokenizers and templates for the tests of data."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHATML, SPECIALS
from trimtab.data import Row

END = "<|im_end|>"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]
# Says what Qwen3's and DeepSeek's templates do: thoughts of earlier turns vanish once a later turn follows.
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)

# As published with the models (shortened where only errors are raised): template, its special tokens, what one answer "A" is supervised as.
PUBLISHED = {
    "llama-3": (
        (
            "{% set ns = bos_token %}{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
            "+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "A<|eot_id|>",
    ),
    "gemma": (
        (
            "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
            "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
        ),
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "A<end_of_turn>",
    ),
    "mistral": (
        (
            "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
            "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        ),
        ["<s>", "</s>"],
        " A</s>",
    ),
    "phi-3": (
        (
            "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
        ),
        ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
        "A<|end|>",
    ),
}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns: str, origin: str = "rows.jsonl:1") -> Row:
    """A conversation of user and assistant turns by turns."""
    roles = ("user", "assistant")
    return Row(origin, messages=tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns)))


def learnt(example: Any, tokenizer: Any) -> str:
    """The supervised tokens as text."""
    return tokenizer.decode(example.ids[example.supervised].tolist(), skip_special_tokens=False)


def chatml_mask(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """An oracle that reads the mask off the ids: after "<|im_start|>assistant\\n", through <|im_end|>. Knows no text and no rendering."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", END])
    header = tokenizer.encode("assistant\n", add_special_tokens=False)
    mask, t = np.zeros(len(ids), dtype=bool), 0
    while t < len(ids):
        if ids[t] == start and ids[t + 1 : t + 1 + len(header)].tolist() == header:
            t += 1 + len(header)
            while True:
                mask[t] = True
                t += 1
                if ids[t - 1] == end:
                    break
        else:
            t += 1
    return mask


@cache
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges line breaks ("\\n\\n" is one token), as GPT-2's family does, so that answers can merge into prompts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["assistant\n\n\n\nuser\n\n\nHello there, so long\n\n\n\n and thanks   for all\n\n the fish"] * 20
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(SPECIALS), show_progress=False
        ),
    )
    return _fast(backend)


def blank_adding_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a blank before every text, as SentencePiece models do, so pieces tokenise otherwise than the whole; plain text gets a bos."""
    alphabet = ["▁", *map(chr, range(32, 127)), "\n"]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[], unk_token=None))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    bos = backend.token_to_id("<|endoftext|>")
    backend.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)])
    tokenizer = _fast(backend)
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def folding_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cases before it looks for special tokens, so that <|IM_END|> turns into one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=True) for t in SPECIALS])
    return _fast(backend)


def _fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token="<|pad|>", model_max_length=512, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer
