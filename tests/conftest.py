"""What every test stands on: no hub, two threads unless OMP_NUM_THREADS says otherwise, one tiny base folder a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch is imported: see trimtab/__init__.py

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_folder

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))  # `make test` gives each of its two workers one core


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base's folder on disk: tiny random Llama in fp32 with the tiny tokenizer. Do not write into it."""
    return tiny_folder(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty trimtab cache of this test's own."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRIMTAB_CACHE", str(cache))
    return cache
