"""A plugin for pytest: the machine seems to be crowded all the time, so that a crew shares the kernels' loops."""

import atexit
import ctypes
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trimtab.ops import native

_loads, _path = tempfile.mkstemp()
os.close(_loads)
Path(_path).write_text("0.10 0.20 0.30 500/600 4321\n")
atexit.register(os.unlink, _path)
native.LOADS = _path.encode()  # before any module of tests loads the kernels
torch.set_num_threads(3)


@pytest.fixture(scope="session", autouse=True)
def _crowded() -> Iterator[None]:
    library = native.load()[0]
    until = time.monotonic() + 60
    while not library.crowd_seen():
        assert time.monotonic() < until
        time.sleep(0.01)
    library.crew_works.restype = ctypes.c_int64
    yield
    assert library.crew_works() > 100, "a crew has run the kernels"
