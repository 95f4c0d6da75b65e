"""bench/gpu.py, tried where there is no GPU: each item runs, and says what it found."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_item_runs() -> None:
    long = ("--minutes", "30")  # a busy machine takes longer
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--tiny", *long]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"item"')]
    assert not [line for line in lines if "failed" in line]
    assert {line["item"].partition(" ")[0] for line in lines if "skipped" in line} <= {"vllm"}
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert {line["item"].replace(" ", "-") for line in lines} == set(bench.ITEMS)
