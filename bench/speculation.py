"""Speculation: tokens a CPU second of decoding with and without drafts, for answers that quote their prompt and for free text.

    python bench/speculation.py                     # smollm2-135m-instruct, 1, 8 and 32 streams
    python bench/speculation.py --streams 1 --new-tokens 16 --repeat 1

Prompts are of the support tenant (examples/desks/support). `quote` gives the model articles of the help pages and asks for them word for
word; `free` asks for a reply to a customer. Both engines answer in turns, greedily, end tokens ignored, on one thread; of each the best of
--repeat runs counts. Each stream asks again when it has its answer, ROUNDS times. What is measured are the tokens from the moment when all
streams have their first one to the moment when the last request begins, so that there are as many streams all the time; prompts after the
first round are in the cache. Answers are compared token by token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import trimtab
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.serve.request import Delta, Request, SamplingParams

SUPPORT = Path(__file__).resolve().parent.parent / "examples" / "desks" / "support" / "train.jsonl"
KINDS = ("quote", "free")
ARTICLES = 5
ROUNDS = 4


def prompts(base: trimtab.Base, kind: str, count: int) -> list[tuple[int, ...]]:
    """Different ones, as token ids."""
    rows = [json.loads(line)["messages"] for line in SUPPORT.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    found = []
    for _ in range(count):
        if kind == "quote":
            articles = "\n".join(row[2]["content"] for row in draw.sample(rows, ARTICLES))
            text = f"Here are articles of our help pages:\n\n{articles}\n\nRepeat these articles word for word, in the same order."
        else:
            text = f"A customer writes: {draw.choice(rows)[1]['content']}\n\nWrite a friendly reply of several paragraphs."
        found.append(tuple(base.encode_prompt(text, "You are Halyard support.")))
    return found


def measure(engine: Engine, asked: Sequence[tuple[int, ...]], new: int, run: str) -> tuple[float, list[list[int]]]:
    """(tokens a CPU second while all streams run, the answers)."""
    streams, asked = len(asked), [*asked] * ROUNDS
    came: list[list[tuple[int, float]]] = [[] for _ in asked]

    def sink(i: int, delta: Delta) -> None:
        assert delta.error is None, delta.error
        came[i] += [(t.id, time.process_time()) for t in delta.tokens]

    for i, ids in enumerate(asked):
        request = Request(f"{run}-{i}", ids, SamplingParams(max_tokens=new, ignore_eos=True))
        engine.submit(request, lambda delta, i=i: sink(i, delta))
    while engine.requests:
        engine.step()
    began, ended = max(c[0][1] for c in came[:streams]), max(c[0][1] for c in came)
    return sum(began < at <= ended for c in came for _, at in c) / (ended - began), [[i for i, _ in c] for c in came]


def compare(base: trimtab.Base, kind: str, streams: int, new: int, repeat: int) -> dict[str, float]:
    """Tokens a CPU second without and with drafts, their ratio, how many drafts were right, how many answers are the same."""
    asked = prompts(base, kind, streams)
    size = 16 * -(-(max(map(len, asked)) + new) // 16)
    config = {"kv_bytes": 2 * streams * size * 2 * base.spec.num_layers * base.spec.kv_width * base.dtype.itemsize, "adapter_bytes": 1}
    engines = [Engine(base, EngineConfig(**config, max_running=streams, speculate=on)) for on in (False, True)]
    best, said = [0.0, 0.0], [list[list[int]](), list[list[int]]()]
    for r in range(repeat):
        for which, engine in enumerate(engines):
            speed, said[which] = measure(engine, asked, new, f"run{r}")
            best[which] = max(best[which], speed)
    stats = engines[1].stats()
    for engine in engines:
        engine.close()
    same = sum(a == b for a, b in zip(*said, strict=True))
    right = stats.accepted_tokens / max(1, stats.drafted_tokens)
    drafted = stats.drafted_tokens / stats.generation_tokens
    return {
        "without": best[0],
        "with": best[1],
        "ratio": best[1] / best[0],
        "drafted": drafted,
        "right": right,
        "same": same / (streams * ROUNDS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    base = trimtab.load_base(args.base, dtype=args.dtype)
    print("| text | streams | without, tokens/CPU s | with | ratio | drafted a token | right | same answers |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for kind in args.kinds:
        for streams in args.streams:
            r = compare(base, kind, streams, args.new_tokens, args.repeat)
            speeds = f"{r['without']:.1f} | {r['with']:.1f} | {r['ratio']:.2f}"
            print(f"| {kind} | {streams} | {speeds} | {r['drafted']:.2f} | {r['right']:.2f} | {r['same']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
