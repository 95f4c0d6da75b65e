"""A base's way from its folder to the device, and how long its hashes take."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from on_gpu.common import Setting, random_model, run_points, tokenizer


def loading(setting: Setting, size: str) -> None:
    from trimtab.bases import fingerprint_folder, load
    from trimtab.bases.unchanged import Watch

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIMTAB_CACHE"] = f"{folder}/cache"
        model = random_model(setting, size)
        numbers = sum(p.numel() for p in model.parameters())
        model.save_pretrained(f"{folder}/base")
        tokenizer().save_pretrained(f"{folder}/base")
        del model
        loaded: list[Any] = []
        watches: list[Watch] = []

        def timed(work: Any) -> Mapping[str, float]:
            began = perf_counter()
            work()
            setting.wait()
            took = perf_counter() - began
            return {"seconds": took, "gb_per_s": 2 * numbers / took / 1e9}

        def first() -> None:
            loaded.append(load(f"{folder}/base", device=setting.device))

        points = {
            "hash of the folder": lambda: timed(lambda: fingerprint_folder(Path(folder) / "base")),
            "load, the hash is known": lambda: timed(first),
            "hash of the model": lambda: timed(lambda: watches.append(Watch(loaded[0].model))),
            "whether the model has changed": lambda: timed(lambda: watches[0].now(loaded[0].model)),
        }
        run_points(setting, f"loading {size}", points)
