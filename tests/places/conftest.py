"""Ranks are forks of a process with one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A fork has none of OpenMP's other threads, and would wait for them for ever. The reference has one thread too: two add up in another
    order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
