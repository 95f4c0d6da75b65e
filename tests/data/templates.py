"""Chat templates in the styles of many families, written for the tests: each with what it shows, its control tokens, and its end token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.tiny import CHATML, tiny_tokenizer


@dataclass(frozen=True)
class Style:
    """template: the text. specials: its control tokens beside ChatML's; the first is bos, the last eos, where there are any."""

    template: str
    specials: tuple[str, ...] = ()
    eos: str = "<|im_end|>"

    def tokenizer(self) -> Any:
        made = tiny_tokenizer()
        if self.specials:
            made.add_special_tokens({"additional_special_tokens": list(self.specials), "bos_token": self.specials[0]})
        made.eos_token = self.eos
        made.chat_template = self.template
        return made


STYLES = {
    "chatml": Style(CHATML),
    # <|start_header_id|>, contents trimmed, results of tools as JSON
    "llama-3": Style(
        "{{ bos_token }}{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}"
        "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
        "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    # refuses system turns, no generation prompt
    "mistral-first": Style(
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
        "{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
    ),
    # the system's text stands in the last user turn, and vanishes once that is answered
    "mistral-later": Style(
        "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
        "{% if loop.last and sys is defined %}{{ '[INST] ' + sys + '\n\n' + m.content + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% else %}"
        "{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
    ),
    # role "model", system refused, contents trimmed
    "gemma": Style(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
        "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
    ),
    # reads lists of parts only: a text has no parts, so nothing is written
    "parts-only": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "parts-or-text": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # writes three roles and drops every other in silence
    "three-roles": Style(
        "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # only the first system turn, and only before everything else
    "no-system": Style(
        "{% for m in messages if m.role in ['user', 'assistant'] %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # the prompt opens a reasoning block; finished turns have none
    "r1": Style(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1] %}"
        "{{ '<|im_start|>assistant\n' + c + '<|im_end|>' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    ),
    # the prompt opens a reasoning block; finished turns have an empty one
    "nemotron": Style(
        "{% for m in messages %}{% set c = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
        "{{ '<|im_start|>' + m.role + '\n' + ('<think></think>' if m.role == 'assistant' else '') + c + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    ),
    # a shut reasoning block in the prompt; finished turns have none
    "no-thinking": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
    ),
    # reasoning of turns before the last question is taken out; the last answer gets an empty block where it has none
    "qwen-3": Style(
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
        "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # channels; knows developer; the last turn ends otherwise than those before it
    "harmony": Style(
        "{% for m in messages %}{% if m.role in ['system', 'developer'] %}{{ '<|start|>developer<|message|># Instructions\n\n' + m.content "
        "+ '<|end|>' }}{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% elif m.role == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last and not add_generation_prompt "
        "else '<|end|>') }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        ("<|startoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        "<|return|>",
    ),
    "no-end": Style(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    # writes the prompt for the next answer whether it is asked or not
    "always-asks": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    ),
    # text behind a finished conversation
    "footer": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt else '### END ###' }}"
    ),
    # no generation prompt: the header is part of the answer
    "headless": Style("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"),
    # text around each content, behind it without a control token
    "quoting": Style(
        "{% for m in messages %}{{ m.role + ': <<' + m.content + '>> (end)\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    # reads the user's content as parts and writes every other as it is, a list as its code
    "parts-user": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'user' %}{% for part in m.content %}{{ part.text }}"
        "{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}

PARTS = {"parts-only": {"system", "user", "assistant", "tool", "critic"}, "parts-user": {"user"}}
"""Whose contents a style takes as lists of parts."""


def shaped(messages: Any, style: str) -> list[dict[str, Any]]:
    """The messages as a style's template takes them."""
    parts = PARTS.get(style, set())
    return [{**m, "content": [{"type": "text", "text": m["content"]}] if m["role"] in parts else m["content"]} for m in messages]
