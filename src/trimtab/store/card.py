"""The model card: the README.md beside an adapter's files, for people and for the Hugging Face hub.

It repeats what the folder's other files say, and explains how to load them. Loading does not check it, so it may be edited. Its last line
has a digest of the lines above, which shows whether a card is still as trimtab wrote it.

Names, settings and scores may contain any text. They are put into code spans and code blocks only, where Markdown and HTML have no effect.
The front matter has nothing but the id of a hub repository.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import yaml

from trimtab.bases.locate import HUB_ID
from trimtab.methods import Head, LoraConfig, Method
from trimtab.methods.base import Site

CARD = "README.md"
MARK = "<!-- trimtab wrote this card: sha256:{}; edit it freely, an edited one is never replaced -->\n"
_MARK = re.compile(re.escape(MARK).replace(r"\{\}", "([0-9a-f]{64})"))
MAX_CARD_BYTES = 2**20
MAX_SPAN, MAX_BLOCK = 200, 8000
"""Characters of one value and of the settings that a card shows; trimtab.json has the rest."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""
PIPELINES = {"SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
AUTO = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}
PLAIN_NAME = re.compile(r"[\w./@:~-]{1,200}", re.ASCII)


def make_card(method: Method, note: Mapping[str, Any], sites: Sequence[Site], weights_bytes: int, head: Head | None = None) -> bytes:
    """The card of an adapter. note: trimtab.json's content. sites: those of its tensors. weights_bytes: of adapter_model.safetensors."""
    body = "\n".join(
        [
            *_front_matter(method, note, head),
            *_facts(method, note, sites, weights_bytes, head),
            *_scores(note),
            *_uses(method, note, sites, head),
        ]
    )
    data = (body.rstrip() + "\n\n").encode("utf-8", "replace")
    return data + MARK.format(hashlib.sha256(data).hexdigest()).encode()


def is_untouched(card: Path) -> bool:
    """Whether this file is a card as trimtab wrote it, without later edits."""
    if card.is_symlink() or not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
        return False
    body, newline, last = card.read_bytes().rpartition(b"\n<!--")
    found = _MARK.fullmatch((b"<!--" + last).decode("utf-8", "replace"))
    return found is not None and found[1] == hashlib.sha256(body + newline[:1]).hexdigest()


# ---- its parts, in order ----


def _front_matter(method: Method, note: Mapping[str, Any], head: Head | None) -> Iterator[str]:
    """What the hub reads. Its base_model must be a hub id; other names are left to the table below."""
    name = _base_name(note)
    yield "---"
    if name and _on_hub(name):
        yield f"base_model: {name}"  # letters, digits, '.', '_', '-' about one slash: text in YAML as it is
        yield "base_model_relation: adapter"
    if method.in_peft:
        yield "library_name: peft"
    yield f"pipeline_tag: {PIPELINES[head.task] if head else 'text-generation'}"
    yield f"tags: [trimtab, {method.name}]"
    yield "---"


def _facts(method: Method, note: Mapping[str, Any], sites: Sequence[Site], weights_bytes: int, head: Head | None) -> Iterator[str]:
    base, run = note.get("base") or {}, note.get("run") or {}
    tensors = [shape for s in sites for shape in s.shapes.values()]
    numbers = sum(prod(shape) for shape in tensors)
    yield f"\n# {method.name} adapter\n"
    yield "A part that was trained beside a frozen language model and does nothing without it. The base is not in this folder.\n"
    yield from ("| | |", "|---|---|")
    yield f"| base | {_span(base.get('name') or 'not named')} |"
    yield f"| base's fingerprint | {_span(base.get('fingerprint') or 'not known')} |"
    yield f"| method | {method.name} (`{method.peft_type}`) |"
    yield f"| parameters | {numbers:,} in {len(tensors):,} tensors, {weights_bytes:,} bytes |"
    if head is not None:
        yield f"| head | {_span(head.module)}, {len(head.labels):,} scores: {_span(', '.join(head.labels))} |"
    if run.get("data_digest"):
        yield f"| training rows | {_span(run['data_digest'])} |"
    yield f"| made | {_span(note.get('created'))} by trimtab {_span(note.get('trimtab'))} |"
    settings = {k: v for k, v in run.items() if k not in ("metrics", "base_metrics", "data_digest")}
    yield "\n## Settings\n"
    said = _without_none({"method": method.name, "fields": note.get("fields"), **settings})
    yield from _block("yaml", yaml.safe_dump(said, sort_keys=False, width=120))


def _scores(note: Mapping[str, Any]) -> Iterator[str]:
    """The scores on held-out rows, beside the base's where they are known."""
    run = note.get("run") or {}
    own, base = ({k: v for k, v in _mapping(run.get(n)).items() if _number(v) and k != "rows"} for n in ("metrics", "base_metrics"))
    if not own:
        return
    rows = _mapping(run.get("metrics")).get("rows")
    yield f"## Scores on {f'{rows:,} ' if _number(rows) else ''}held-out rows\n"
    yield from ("| score | base | with this adapter |", "|---|---:|---:|") if base else ("| score | value |", "|---|---:|")
    for name, value in own.items():
        before = ([f"{base[name]:.6g}"] if name in base else ["–"]) if base else []
        yield f"| {' | '.join([_span(name), *before, f'{value:.6g}'])} |"
    yield ""


def _uses(method: Method, note: Mapping[str, Any], sites: Sequence[Site], head: Head | None) -> Iterator[str]:
    """How to load it, and what it cannot do."""
    name = _base_name(note)
    shown = name if name and PLAIN_NAME.fullmatch(name) else "BASE"
    yield "## Use\n"
    yield "`FOLDER` is this folder. trimtab loads it on the base with the fingerprint above and refuses any other base, tokenizer or chat"
    yield "template.\n"
    command = "generate" if head is None else "score"
    yield from _block("bash", f'trimtab {command} --base {shlex.quote(shown)} --adapter FOLDER "…"')
    code = f'import trimtab\n\nbase = trimtab.load_base({json.dumps(shown)})\nadapter = trimtab.Adapter.load("FOLDER", base)\n'
    call = (
        'base.generate(["…"], adapters=[adapter])[0]' if head is None else 'base.scores([base.tokenizer("…")["input_ids"]], [adapter])[0]'
    )
    yield from _block("python", f"{code}print({call})")
    yield from _in_peft(method, shown, head)
    yield from _in_vllm(method, sites, shown)
    if not method.mergeable:
        yield "It cannot be merged into the base's weights.\n"


def _in_peft(method: Method, base: str, head: Head | None) -> Iterator[str]:
    if not method.in_peft:
        yield "peft has no such method and cannot load this folder.\n"
        return
    yield "With peft, which does not check that the base is the right one:\n"
    known = _on_hub(base)
    where = json.dumps(base) if known else f"trimtab.load_base({json.dumps(base)}).path"
    auto = AUTO[head.task] if head else "AutoModelForCausalLM"
    labels = f", num_labels={len(head.labels)}" if head else ""
    yield from _block(
        "python",
        ("" if known else "import trimtab\n")
        + f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        + f"model = {auto}.from_pretrained({where}{labels})\n"
        + 'model = PeftModel.from_pretrained(model, "FOLDER")',
    )


def _in_vllm(method: Method, sites: Sequence[Site], base: str) -> Iterator[str]:
    problems = vllm_problems(method, sites)
    if problems:
        yield f"vLLM cannot load this folder: {'; '.join(problems)}.\n"
        return
    rank = next(r for r in VLLM_RANKS if r >= sites[0].rank)
    yield "With vLLM, where it supports LoRA for this architecture:\n"
    # a base that has no hub id lies in a folder, which `trimtab.load_base(NAME).path` tells
    served = shlex.quote(base) if _on_hub(base) else "BASE-FOLDER"
    yield from _block("bash", f"vllm serve {served} --enable-lora --max-lora-rank {rank} --lora-modules adapter=FOLDER")


def vllm_problems(method: Method, sites: Sequence[Site]) -> list[str]:
    """Why vLLM cannot load an adapter's folder as it is; empty if it can. It ignores patterns and knows LoRA's two matrices only."""
    if not isinstance(method, LoraConfig):
        return [f"it knows LoRA, and this is {method.name}"]
    problems = ["it has no DoRA"] if method.use_dora else []
    if any(s.saved for s in sites):
        problems.append("it has no modules_to_save")
    if any(t.startswith("lora_embedding") for s in sites for t in s.shapes):
        problems.append("it has no LoRA on embeddings")
    if len({(s.rank, s.scaling) for s in sites if not s.saved}) > 1:
        problems.append("rank and scaling differ between modules")
    if max((s.rank for s in sites), default=0) > VLLM_RANKS[-1]:
        problems.append(f"its rank is above {VLLM_RANKS[-1]}")
    return problems


# ---- escaping ----


def _span(value: Any) -> str:
    """A value as a code span for a table's cell: one line, printable, no backtick in it can end the span."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    text = " ".join(text.split())
    text = text if len(text) <= MAX_SPAN else text[: MAX_SPAN - 1] + "…"
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def _block(language: str, text: str) -> Iterator[str]:
    """A fenced code block whose fence is longer than any run of backticks in it."""
    text = text if len(text) <= MAX_BLOCK else text[:MAX_BLOCK] + "\n# … trimtab.json has the rest"
    fence = "`" * max(3, _longest_run(text) + 1)
    yield f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


# ---- reading the note ----


def _base_name(note: Mapping[str, Any]) -> str | None:
    name = _mapping(note.get("base")).get("name")
    return name if isinstance(name, str) else None


def _on_hub(name: str) -> bool:
    """Whether a base of this name is one of the hub's: a folder of that name would have been taken first."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _without_none(value: Any) -> Any:
    """JSON values as YAML's plain ones, without keys that say nothing."""
    if isinstance(value, Mapping):
        return {str(k): _without_none(v) for k, v in value.items() if v is not None and v != {}}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value
