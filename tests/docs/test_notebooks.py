"""The notebooks run from the first cell to the last one, by nbmake, on a tiny base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
BASE = "smollm2-135m-instruct"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_is_kept_without_its_results(notebook: Path) -> None:
    """Results change with every run, and may hold paths of a machine."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not [c["id"] for c in cells if c["cell_type"] == "code" and (c["outputs"] or c["execution_count"])]
    assert f'"{BASE}"' in "".join(line for c in cells for line in c["source"])


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_runs(notebook: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    if find_spec("nbmake") is None:
        pytest.skip("nbmake is not installed here: pip install -e '.[dev]'")
    copy = tmp_path / notebook.name
    copy.write_text(notebook.read_text(encoding="utf-8").replace(f'\\"{BASE}\\"', f'\\"{tiny_llama_folder}\\"'), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=120", "-q", "-p", "no:cacheprovider", copy]
    settings = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
