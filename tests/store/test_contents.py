"""Reading an adapter's file: the values of the safetensors library, each byte read and hashed once, annotations looked up once a class."""

from __future__ import annotations

import hashlib
import os
import typing

import pytest
import torch
from safetensors.torch import load_file

from tests.store.common import read_tensors, stirred, tiny_base, write_tensors
from trimtab import hyperparameters
from trimtab.errors import AdapterError
from trimtab.methods import LoraConfig
from trimtab.store import Adapter
from trimtab.store.contents import read_contents
from trimtab.store.files import open_folder
from trimtab.store.header import read_header
from trimtab.store.registry import Store

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def read(folder):
    with open_folder(folder) as opened, opened.open_unhashed(WEIGHTS) as (file, size):
        return read_contents(opened, WEIGHTS, file, *read_header(file, size, WEIGHTS))


def test_tensors_are_those_of_the_safetensors_library(tmp_path):
    """Of all dtypes mixed, in a header's own order, and where a number of one dtype does not begin at a multiple of its size."""
    shapes = [
        ("b", "BF16", torch.bfloat16, (3, 1)),
        ("a", "F32", torch.float32, (2, 5)),
        ("d", "F16", torch.float16, (7,)),
        ("c", "F32", torch.float32, (1,)),
    ]
    header, data = {}, b""
    for name, kind, dtype, shape in shapes:
        raw = torch.randn(shape).to(dtype).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    write_tensors(tmp_path / WEIGHTS, {name: header[name] for name in "dabc"}, data)
    found, want = read(tmp_path), load_file(tmp_path / WEIGHTS)
    assert found.tensors.keys() == want.keys()
    assert all(torch.equal(found.tensors[n], t) and found.tensors[n].dtype == t.dtype for n, t in want.items())
    assert all(t.data_ptr() % t.element_size() == 0 for t in found.tensors.values())
    assert found.digest == "sha256:" + hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()


def test_each_byte_of_the_weights_is_read_and_hashed_once(base, tmp_path, monkeypatch):
    store, counts = Store(tmp_path / "s", create=True), {"read": 0, "hashed": 0}
    stirred(base, LoraConfig(r=8)).save(tmp_path / "a")
    version = store.publish(tmp_path / "a", "acme/x", base=base)
    size = (tmp_path / "a" / WEIGHTS).stat().st_size

    class Sha:
        def __init__(self, data=b""):
            self.sha = hashlib.new("sha256")
            self.update(data)

        def update(self, data):
            counts["hashed"] += len(data)
            self.sha.update(data)

        def hexdigest(self):
            return self.sha.hexdigest()

    def counted(function):
        def call(*args):
            got = function(*args)
            counts["read"] += got if isinstance(got, int) else len(got)
            return got

        return call

    monkeypatch.setattr(hashlib, "sha256", Sha)
    monkeypatch.setattr(os, "read", counted(os.read))
    monkeypatch.setattr(os, "readv", counted(os.readv))
    with store.open(version) as folder:
        Adapter.read(folder, base, "it")
    small = sum(path.stat().st_size for path in (tmp_path / "a").iterdir()) - size
    assert size <= counts["read"] <= size + 2 * small, "the small files pass through a copy"
    assert size <= counts["hashed"] <= size + 2 * small


@pytest.mark.parametrize(("at", "said"), [(12, "is refused"), (-3, "is damaged")], ids=["header", "data"])
def test_a_blob_that_was_damaged_is_refused(base, tmp_path, at, said):
    store = Store(tmp_path / "s", create=True)
    stirred(base, LoraConfig(r=2)).save(tmp_path / "a")
    version = store.publish(tmp_path / "a", "acme/x", base=base)
    blob = store.blob_path(version.files[WEIGHTS].digest)
    data = bytearray(blob.read_bytes())
    data[at] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with store.open(version) as folder, pytest.raises(AdapterError, match=said):
        Adapter.read(folder, base, "it")


def test_annotations_are_looked_up_once_a_class(monkeypatch):
    LoraConfig(r=2)
    calls = []
    monkeypatch.setattr(hyperparameters, "get_type_hints", lambda cls: calls.append(cls) or typing.get_type_hints(cls))
    LoraConfig(r=4)
    assert calls == []


def test_finite_values_whose_sum_is_not_are_taken(base, tmp_path):
    stirred(base, LoraConfig(r=2)).save(tmp_path / "a")
    header, data = read_tensors(tmp_path / "a" / WEIGHTS)
    start, stop = next(v["data_offsets"] for n, v in header.items() if n != "__metadata__")
    big = torch.full(((stop - start) // 4,), 3e38).numpy().tobytes()
    (tmp_path / "a" / "trimtab.json").unlink()
    write_tensors(tmp_path / "a" / WEIGHTS, header, data[:start] + big + data[stop:])
    assert max(float(t.max()) for t in Adapter.load(tmp_path / "a", base).params.values()) > 2e38
