"""What every test stands on: no hub, two threads unless OMP_NUM_THREADS says otherwise, one tiny base folder a session, a seed a test."""

from __future__ import annotations

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ["XDG_DATA_HOME"] = DATA = tempfile.mkdtemp(prefix="trimtab-tests-")  # the user's store and tenants are not for tests
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch is imported: see trimtab/__init__.py

import gc
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_folder

FAST_FAMILIES = {"llama", "gpt2", "gemma3_text"}
"""Of the families that a test goes through, those that `make test` runs: together they have every kind of norm, position, bias, window and
tied head. The others are for `make test-slow`."""

gc.disable()  # until all tests are imported
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))  # `make test` gives each of its two workers one core


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = [(item, item.callspec.params["family"]) for item in items if "family" in getattr(getattr(item, "callspec", None), "params", ())]
    runs_fast = {item.function for item, family in found if family in FAST_FAMILIES}
    for item, family in found:
        if family not in FAST_FAMILIES and item.function in runs_fast:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the imports have made stays: a million objects. A collection that looks at all of them takes a third of a second, and there are
    many."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    shutil.rmtree(DATA, ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a generator of its own (a start of peft's, say) does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base's folder on disk: tiny random Llama in fp32 with the tiny tokenizer. Do not write into it."""
    return tiny_folder(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture
def compared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are built alike are compared with transformers once in a process; where faults are planted, they are compared again."""
    from trimtab.forward import decode_path_check, proof, rowwise

    for where, name in ((decode_path_check, "_agreed"), (proof, "_proved"), (rowwise, "_agreed")):
        monkeypatch.setattr(where, name, {})


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty trimtab cache of this test's own."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRIMTAB_CACHE", str(cache))
    return cache
