"""Rows of two turns: what `check` and training's preparation take, and a hand-written `datasets.map` that renders and tokenises them."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from curves.curve import Curve, Point, cpu_seconds, peak_bytes

WORDS = [w for w in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split() if w.isalpha()]
HELD_OUT = 200


def write(path: Path, rows: int, seed: int) -> None:
    """Questions of 30 words and answers of 25."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            asked, said = (" ".join(rng.choices(WORDS, k=k)) for k in (30, 25))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": messages}) + "\n")


def measured(work: Callable[[Path], Any], rows: int) -> list[float | str]:
    """(µs of CPU a row, MB of memory at the peak), after a run on one row; caches are empty at first."""
    base()
    with tempfile.TemporaryDirectory() as name:
        os.environ["TRIMTAB_CACHE"] = os.environ["HF_DATASETS_CACHE"] = str(Path(name) / "cache")
        for split, number in (("one", 1), ("all", rows)):
            folder = Path(name) / split
            folder.mkdir()
            write(folder / "train.jsonl", number, seed=number)
            write(folder / "test.jsonl", min(HELD_OUT, number), seed=0)
        work(Path(name) / "one")
        seconds = cpu_seconds(lambda: work(Path(name) / "all"))
    return [1e6 * seconds / rows, peak_bytes() / 1e6]


@cache
def base() -> str:
    from trimtab.bases.locate import locate

    return str(locate("smollm2-135m-instruct", lambda line: None))


def run_of(folder: Path) -> Any:
    from trimtab.train import RunConfig

    content = {
        "base": base(),
        "out": "out",
        "data": {"rows": {"train": "train.jsonl", "test": "test.jsonl"}},
        "variants": {"v": {"data": "rows", "method": "lora", "max_length": 1024}},
        "evaluate": {"generate": False},
    }
    return RunConfig.from_dict(content, root=folder)


def checked(rows: int) -> list[float | str]:
    from trimtab.train.check import check

    return measured(lambda folder: check(run_of(folder)), rows)


def prepared(rows: int) -> list[float | str]:
    from types import SimpleNamespace

    from trimtab.train.check import read_base
    from trimtab.train.prepare import read_splits

    tokenizer, architecture = read_base(base(), lambda text: None)
    without_weights: Any = SimpleNamespace(tokenizer=tokenizer, spec=architecture.spec)

    def work(folder: Path) -> None:
        run = run_of(folder)
        read_splits(run, "rows", run.data["rows"], without_weights)

    return measured(work, rows)


def mapped(rows: int) -> list[float | str]:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base())

    def encoded(batch: dict[str, Any]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    def work(folder: Path) -> None:
        files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
        data = datasets.load_dataset("json", data_files=files, cache_dir=str(folder / "cache"))
        data.map(encoded, batched=True, remove_columns=["messages"])

    return measured(work, rows)


def limit(point: Point) -> str:
    return "1.2 times datasets.map, 1,500 MB" if point.value >= 1_000_000 else "1.2 times datasets.map"


CURVE = Curve(
    what="`check` on rows of two turns and 55 words, beside 200 held-out ones, the bundled base's tokenizer",
    grows="rows",
    points=[Point(f"{n:,}", n, long=n > 10_000) for n in (1_000, 10_000, 100_000, 1_000_000)],
    columns=["CPU µs a row", "peak MB"],
    ours=checked,
    peers={"datasets.map": mapped},
    limit=limit,
    timeout_s=3600,
)
