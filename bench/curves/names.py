"""A store of many names: finding one, changing one, listing, and what a change costs the streams of a server."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import threading
import time
from array import array
from dataclasses import asdict
from hashlib import sha256
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from curves.curve import Curve, Point, cpu_seconds

MANIFESTS, PAGE, MOVES = 1200, 1000, 5
"""Names with a manifest of their own, which are those of the first page; the others share one."""


def path(i: int) -> str:
    return f"tenant-{i % 100:02d}/adapter-{i:07d}"


def folder(at: Path, seed: int) -> Path:
    """A LoRA folder of one small matrix."""
    at.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "tiny",
        "revision": str(seed),
    }
    (at / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    header = {
        f"{layer}{half}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [64 * i, 64 * i + 64]}
        for i, (half, shape) in enumerate({"A": [2, 8], "B": [8, 2]}.items())
    }
    told = json.dumps(header).encode()
    (at / "adapter_model.safetensors").write_bytes(
        len(told).to_bytes(8, "little") + told + array("f", range(seed + 1, seed + 33)).tobytes()
    )
    return at


def made(root: Path, work: Path, count: int) -> None:
    """A store of so many names, each with one version and an alias. Its blobs are put in by hand, its index is the store's own."""
    from trimtab.store.index import Entry, Index, Name
    from trimtab.store.registry import Store

    store = Store(root, create=True)
    manifest = json.loads(store.manifest(store.publish(folder(work / "a", 0), "tenant-00/first").digest))
    entries = []
    for i in range(min(count, MANIFESTS)):
        manifest.setdefault("annotations", {})["org.opencontainers.image.created"] = f"2026-01-01T00:{i // 60:02d}:{i % 60:02d}+00:00"
        data = json.dumps(manifest, separators=(",", ":")).encode()
        digest = sha256(data).hexdigest()
        (root / "blobs" / "sha256" / digest).write_bytes(data)
        entries.append(Entry(f"sha256:{digest}", len(data)))
    ordered = sorted(map(path, range(count)))
    names = {p: Name(p, {1: entries[min(i, len(entries) - 1)]}, {"prod": 1}, 1) for i, p in enumerate(ordered)}
    (root / "index.json").write_bytes(Index(names).to_bytes())


def ours(count: int) -> list[float | str]:
    from trimtab.serve.catalog import Catalog
    from trimtab.serve.tenant import LOCAL
    from trimtab.store.registry import Store

    with tempfile.TemporaryDirectory(prefix="trimtab-names-") as at:
        work, root = Path(at), Path(at) / "store"
        made(root, work, count)
        gc.collect()
        one, base = path(count // 2), SimpleNamespace(name="tiny", fingerprint="", base_differs=False)
        resolve = cpu_seconds(lambda: Store(root).resolve(one), 3)
        listed: list[Any] = []

        def first_page() -> None:
            found = Catalog(base, Store(root)).models(LOCAL)  # type: ignore[arg-type]
            listed.extend(found if isinstance(found, list) else islice(found, PAGE))  # earlier versions have no pages

        models = cpu_seconds(first_page)
        size = len(json.dumps([asdict(m) for m in listed]))
        store, folders = Store(root), [folder(work / f"f{i}", i + 1) for i in range(MOVES)]
        store.resolve(one)
        publish = min(cpu_seconds(lambda i=i, f=f: store.publish(f, f"tenant-50/new-{i}")) for i, f in enumerate(folders))  # type: ignore[misc]
        return [1e3 * resolve, 1e3 * publish, 1e3 * models, size / 1e6, 1e3 * gap(Catalog(base, Store(root)), store, one)]  # type: ignore[arg-type]


def gap(catalog: Any, store: Any, one: str) -> float:
    """An alias moves, and a request asks for it: how long another thread, which wakes each millisecond as a stream's does, has to wait. The
    longest wait at a move; the least of some moves, since other work on the machine makes it longer."""
    from trimtab.serve.tenant import LOCAL

    sys.setswitchinterval(0.0002)  # as a server does
    found = []
    for i in range(MOVES):
        store.alias(f"{one}@1", f"moved{i}")
        asked = threading.Thread(target=catalog.find, args=(f"{one}@moved{i}", LOCAL))
        waits, last = list[float](), time.perf_counter()
        asked.start()
        while not waits or asked.is_alive():
            time.sleep(0.001)
            waits.append(-last + (last := time.perf_counter()))
        found.append(max(waits))
    return min(found)


CURVE = Curve(
    what="a store of many names, one version and one alias each",
    grows="names",
    points=[Point(f"{n:,}", n, long=n > 10**5) for n in (10**2, 10**3, 10**4, 10**5, 10**6)],
    columns=["resolve, fresh, CPU ms", "publish, CPU ms", "/v1/models, CPU ms", "MB", "longest gap, ms"],
    ours=ours,
    limit=lambda point: "resolve 20, publish 10, gap 30",
)
