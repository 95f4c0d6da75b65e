"""Law 13 over the chat templates that TRL ships: every answer is trained as it will be served, or the row is dropped with the true reason.

What is served is what transformers' `apply_chat_template` gives for the turns before the answer, with the generation prompt. The tokenizer
has each template's control tokens.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl

from tests.tiny import tiny_tokenizer
from trimtab.data import Example, Row, encode_row

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(p.stem for p in FOLDER.glob("*.jinja"))
RELATIVE = re.compile("_training|_v[2-9]|nemotron_3_|diffusion_")
"""Templates that differ little from others of the list."""
CONTROL = re.compile(
    r"<\|[^|<>\s{}]+\|>|<[｜|][^<>\s{}]+[｜|]>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|\[/?INST\]|<end_of_utterance>|<\|?channel\|?>|</?s>"
)
TALKS: dict[str, list[dict[str, str]]] = {
    "plain": [
        {"role": "user", "content": "first?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "second?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "third?"},
        {"role": "assistant", "content": "One."},
    ],
    "system": [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "Two."},
    ],
    "words that templates write too": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "n"},
        {"role": "user", "content": "in"},
        {"role": "assistant", "content": "end"},
    ],
    "reasoning in the content": [
        {"role": "user", "content": "6 * 7?"},
        {"role": "assistant", "content": "<think>\nsix times seven is 42\n</think>\n\n42"},
        {"role": "user", "content": "and 8?"},
        {"role": "assistant", "content": "<think>\none more six\n</think>\n\n48"},
    ],
    "reasoning beside it": [
        {"role": "user", "content": "6 * 7?"},
        {"role": "assistant", "content": "42", "reasoning_content": "six times seven is 42"},
        {"role": "user", "content": "and 8?"},
        {"role": "assistant", "content": "a", "reasoning_content": "one more six"},  # gpt-oss has an "a" in its headers
    ],
}
NO_SYSTEM = {"gemma", "gemma_training"}
ENDLESS = {"glm4moe"}
"""Its template writes nothing behind an answer: the row's last one gets the end token."""
NO_REASONING = (
    *("cohere", "gemma", "idefics3", "lfm2", "llama3", "llava_next", "phi3", "qwen2_5", "qwen3_instruct_2507", "qwen3_vl", "smolvlm"),
    *("lfm2_v2", "qwen3_5_nothink"),
)
"""Their templates know no reasoning beside the content, or close it in the generation prompt."""


def published_tokenizer(name: str) -> Any:
    text = (FOLDER / f"{name}.jinja").read_text()
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": sorted({*CONTROL.findall(text), "<b>", "<e>"}), "bos_token": "<b>"})
    made.eos_token, made.chat_template = "<e>", text
    return made


def _served(tokenizer: Any, before: list[dict[str, str]], template: str) -> set[str]:
    """What transformers renders before an answer, with each name that templates have for reasoning."""
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in before]
    found = set()
    for name in ("reasoning_content", "reasoning", "thinking"):
        for messages in (before, parts):
            named = [{name if k == "reasoning_content" else k: v for k, v in m.items()} for m in messages]
            try:
                found.add(tokenizer.apply_chat_template(named, tokenize=False, add_generation_prompt=True))
            except Exception:  # templates of the other kind of content
                continue
    return found


@pytest.mark.parametrize("template", [pytest.param(t, marks=pytest.mark.slow) if RELATIVE.search(t) else t for t in TEMPLATES])
def test_every_answer_is_trained_as_it_is_served(template: str) -> None:
    tokenizer = published_tokenizer(template)
    for name, messages in TALKS.items():
        result = encode_row(Row("r:1", messages=tuple(messages)), tokenizer, 100_000)
        if not isinstance(result, Example):
            expected = (name == "system" and template in NO_SYSTEM) or (name == "reasoning beside it" and _knows_none(template))
            assert expected, (name, result)
            continue
        asked = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        runs = [(s, run) for s in result.segments for run in _runs(s)]
        assert len(runs) == len(asked), name
        for (segment, (start, stop)), index in zip(runs, asked, strict=True):
            prompt = tokenizer.decode(segment.ids[:start].tolist())
            assert prompt in _served(tokenizer, messages[:index], template), (name, index)
            answer = tokenizer.decode(segment.ids[start:stop].tolist())
            said = messages[index].get("reasoning_content", "") + messages[index]["content"]
            bare = re.sub(r"</?think>|\s", "", said.replace("</think>", ""))
            assert _is_in_order(bare, answer), (name, answer)
            last = tokenizer.decode(segment.ids[stop - 1 : stop].tolist())
            assert last in tokenizer.all_special_tokens or (template in ENDLESS and index != asked[-1]), (name, last)
            whole = answer.removesuffix(last) if last in tokenizer.all_special_tokens else answer
            assert whole.rstrip().endswith(messages[index]["content"].rpartition("</think>")[2].strip()), (name, answer)


def _knows_none(template: str) -> bool:
    plain = template.removesuffix("_training")
    return plain in NO_REASONING or plain.startswith(("cohere", "gemma", "phi3", "qwen2_5", "lfm2", "llama3"))


def _runs(example: Example) -> list[tuple[int, int]]:
    flags = [False, *example.supervised.tolist(), False]
    starts = [i for i in range(1, len(flags)) if flags[i] and not flags[i - 1]]
    return [(a - 1, next(i for i in range(a, len(flags)) if not flags[i]) - 1) for a in starts]


def _is_in_order(wanted: str, text: str) -> bool:
    """Whether the characters of `wanted` stand in `text` in this order: templates write tags and headers between reasoning and content."""
    rest = iter(text)
    return all(c in rest for c in wanted)


@pytest.mark.slow
def test_most_templates_train_most_talks() -> None:
    """So that the law is not kept by dropping everything: trl 1.16 has 72 templates."""
    kept = dict.fromkeys(TALKS, 0)
    for template in TEMPLATES:
        tokenizer = published_tokenizer(template)
        for name, messages in TALKS.items():
            kept[name] += isinstance(encode_row(Row("r:1", messages=tuple(messages)), tokenizer, 100_000), Example)
    total = len(TEMPLATES)
    assert total >= 70 and kept["plain"] == kept["reasoning in the content"] == total and kept["system"] == total - 2
    assert kept["words that templates write too"] == total
    assert kept["reasoning beside it"] >= 30
