"""The store under many names: time of each operation as it grows, bytes of versions that share tensors, and load times.

    python bench/store.py [--names 10000] [--base smollm2-135m-instruct]

Adapters are real LoRA folders of a small random Llama. Load times are those of an r16 all-linear adapter of the base, files in the page
cache, in turns: from the store (every byte hashed), from its folder (hashed too), and by peft from the same folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

AT = (10, 100, 1_000, 10_000, 100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=int, default=10_000, help="adapters to publish, each under a name of its own")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="for the load times; '' leaves them out")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trimtab-store-bench-") as work:
        figures: dict[str, Any] = {"growth": growth(Path(work), args.names), "sharing": sharing(Path(work))}
        if args.base:
            figures["load"] = load(Path(work), args.base)
    show(figures)
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def show(figures: dict[str, Any]) -> None:
    for title, rows in figures.items():
        rows = rows if isinstance(rows, list) else [rows]
        table = Table(*rows[0], title=title, box=None)
        for row in rows:
            table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
        Console(width=160).print(table)


# ---- growth ----


def growth(work: Path, names: int) -> list[dict[str, Any]]:
    """A row at 10, 100, 1,000 … names. Times in ms: a publish (mean since the last row), and the medians of single calls; `fresh` ones open
    the store anew, as each command does."""
    from trimtab.store.registry import Store

    base = small_base()
    root, rows, spent, since = work / "store", [], 0.0, 0
    store = Store(root, create=True)
    for n in range(1, names + 1):
        folder = adapter(base, work / "adapter", seed=n)
        started = time.perf_counter()
        store.publish(folder, name(n))
        spent, since = spent + time.perf_counter() - started, since + 1
        if n in AT or n == names:
            rows.append({"names": n, "publish": ms(spent / since), **single(root, n), **sizes(root)})
            spent, since = 0.0, 0
            print(json.dumps(rows[-1]), flush=True)
    return rows


def single(root: Path, n: int) -> dict[str, Any]:
    from trimtab.store.registry import Store

    store, one = Store(root), name(n // 2 + 1)
    store.list()
    return {
        "resolve": median(lambda: store.resolve(one), 20),
        "resolve, fresh": median(lambda: Store(root).resolve(one), 5),
        "list": median(store.list, 3),
        "list, fresh": median(lambda: Store(root).list(), 1),
        "list one namespace": median(lambda: store.list("tenant-1"), 3),
        "alias": median(lambda: store.alias(one, "prod") or store.unalias(one, "prod"), 3, calls=2),
    }


def name(n: int) -> str:
    return f"tenant-{n % 100}/adapter-{n}"


def sizes(root: Path) -> dict[str, Any]:
    blobs = [p.stat().st_size for p in (root / "blobs" / "sha256").iterdir()]
    return {"index bytes": (root / "index.json").stat().st_size, "blobs": len(blobs), "MB": round(sum(blobs) / 1e6, 1)}


def small_base() -> Any:
    """A Base around a random Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.model import Base

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    return Base(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), None, name="bench-llama", fingerprint="sha256:" + "0" * 64)


def adapter(base: Any, folder: Path, seed: int) -> Path:
    import trimtab

    shutil.rmtree(folder, ignore_errors=True)
    return trimtab.Adapter.create(base, trimtab.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), seed=seed).save(folder)


# ---- sharing ----


def sharing(work: Path, versions: int = 50) -> list[dict[str, Any]]:
    """Bytes of `versions` versions of one name whose weights are equal (only what is recorded of them differs), and of ones that differ."""
    import trimtab
    from trimtab.store.registry import Store

    base, found = small_base(), []
    for shared in (True, False):
        root = work / f"sharing-{shared}"
        store = Store(root, create=True)
        for n in range(versions):
            made = trimtab.Adapter.create(base, trimtab.LoraConfig(r=16), seed=0 if shared else n)
            store.publish(made.save(work / "version", run={"n": n}), "tenant/name")
        whole = sum(v.size for v in store.versions("tenant/name"))
        kept = sum(p.stat().st_size for p in (root / "blobs" / "sha256").iterdir())
        facts = {"weights": "equal" if shared else "different", "versions": versions}
        found.append(facts | {"bytes of the folders": whole, "bytes in the store": kept, "share": round(kept / whole, 3)})
    return found


# ---- loading ----


def load(work: Path, name: str) -> list[dict[str, Any]]:
    """Medians over rounds that take the ways in turn, so that other work on the machine slows all alike."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import trimtab
    from trimtab.store.registry import Store

    base = trimtab.load_base(name)
    large = trimtab.Adapter.create(base, trimtab.LoraConfig(r=16))
    for tensor in large.params.values():
        tensor.normal_()  # a fresh B is zero
    folder = large.save(work / "large")
    store = Store(work / "large-store", create=True)
    store.publish(folder, "acme/large")
    theirs = AutoModelForCausalLM.from_pretrained(base.path, dtype=base.dtype)

    ways: dict[str, Callable[[], Any]] = {
        "trimtab, store": lambda: trimtab.Adapter.load("acme/large", base, store=store),
        "trimtab, folder": lambda: trimtab.Adapter.load(folder, base),
        "peft, folder": lambda: PeftModel.from_pretrained(theirs, folder),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(6):
        for way, call in ways.items():
            started = time.perf_counter()
            loaded = call()
            times[way].append(time.perf_counter() - started)
            if isinstance(loaded, PeftModel):
                loaded.unload()
    size = (folder / "adapter_model.safetensors").stat().st_size
    return [{"load": way, "bytes": size, "median ms": ms(statistics.median(t[1:])), "fastest ms": ms(min(t))} for way, t in times.items()]


def median(call: Callable[[], Any], rounds: int, calls: int = 1) -> float:
    """Of one call, in ms."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) / calls)
    return ms(statistics.median(times))


def ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


if __name__ == "__main__":
    main()
