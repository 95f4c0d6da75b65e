"""Bases that several threads of a process load at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers.utils import logging

from trimtab import load_base
from trimtab.bases.shapes import read_architecture
from trimtab.forward import proof


def test_threads_load_bases_at_the_same_time(tiny_llama_folder: Path, monkeypatch) -> None:
    """transformers builds a model under settings of the whole process, such as torch's default dtype. Those of another thread would be its
    own, too: a base without fault was refused. Afterwards all settings are as before."""

    def settings() -> tuple[object, ...]:
        return logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype()

    before = settings()

    def load(i: int) -> torch.dtype:
        monkeypatch.setattr(proof, "_proved", {})  # as in a process that has loaded none
        read_architecture(str(tiny_llama_folder))
        return load_base(str(tiny_llama_folder), dtype=("float32", "bfloat16")[i % 2]).dtype

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(load, range(8))) == [torch.float32, torch.bfloat16] * 4
    assert settings() == before
