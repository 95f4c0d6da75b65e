"""The fingerprint names content, not files."""

import hashlib
import json
import os
import shutil
from importlib import import_module
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import FAMILIES, tiny_folder, tiny_model, tiny_tokenizer
from trimtab.bases import fingerprint as module
from trimtab.bases import fingerprint_folder, fingerprint_model, template_digest, tokenizer_digest
from trimtab.errors import BaseError

loading = import_module("trimtab.bases.load")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tiny_llama_folder, tmp_path):
    return shutil.copytree(tiny_llama_folder, tmp_path / "base")


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_formula_by_hand(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    rewrite(tmp_path, {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor([3], dtype=torch.int64)})
    a = hashlib.sha256(b'["I64", [1]]\n' + (3).to_bytes(8, "little")).hexdigest()
    b = hashlib.sha256(b'["F32", [1, 2]]\n' + bytes.fromhex("0000803f00000040")).hexdigest()
    expected = hashlib.sha256(f'"a" {a}\n"b" {b}\n'.encode()).hexdigest()
    assert fingerprint_folder(tmp_path) == f"sha256:{expected}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_and_folder_agree(family, dtype, tmp_path):
    tiny_folder(tmp_path / family, family, dtype=dtype)
    assert fingerprint_model(tiny_model(family, dtype=dtype)) == fingerprint_folder(tmp_path / family)


def test_sharding_and_order_do_not_count(folder):
    whole = fingerprint_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for i in range(3):
        file = f"model-{i}.safetensors"
        save_file({n: tensors[n] for n in names[i::3]}, folder / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert fingerprint_folder(folder) == whole


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_every_change_counts(folder, change):
    before = fingerprint_folder(folder)
    tensors, name = load_file(folder / "model.safetensors"), "model.norm.weight"
    t = tensors.pop(name)
    flipped = t.clone()
    flipped[0] += 1e-6
    rewrite(
        folder, tensors | {"value": {name: flipped}, "name": {name + "s": t}, "dtype": {name: t.int()}, "shape": {name: t[None]}}[change]
    )
    assert fingerprint_folder(folder) != before


def test_tied_head_counts_once_and_a_different_one_counts(tmp_path):
    folder = tiny_folder(tmp_path / "tied", "qwen2")
    alone = fingerprint_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].clone()
    rewrite(folder, tensors | {"lm_head.weight": head})
    assert fingerprint_folder(folder) == alone
    rewrite(folder, tensors | {"lm_head.weight": head + 1})
    assert fingerprint_folder(folder) != alone


def test_result_is_kept_and_renewed(folder, own_cache, monkeypatch):
    first = fingerprint_folder(folder)
    (note,) = (own_cache / "fingerprints").iterdir()
    with monkeypatch.context() as m:
        m.setattr(module, "_content_of_stored", lambda t: pytest.fail("read again although nothing changed"))
        assert fingerprint_folder(folder) == first
    note.write_text("{ not json")
    assert fingerprint_folder(folder) == first
    note.write_text(json.dumps({"stamp": [], "fingerprint": "sha256:lies"}))
    assert fingerprint_folder(folder) == first
    os.utime(folder / "model.safetensors", ns=(1, 1))
    kept = json.loads(note.read_text())
    assert fingerprint_folder(folder) == first and json.loads(note.read_text()) != kept


def test_other_weights_of_the_same_size_and_time_are_seen(folder):
    """As archives and image layers leave them: the files' names and times say nothing of what they hold."""
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    first = fingerprint_folder(folder)
    other = bytearray(weights.read_bytes())
    other[-1] ^= 1
    weights.write_bytes(other)
    os.utime(weights, ns=(1, 1))
    assert fingerprint_folder(folder) != first


def test_unwritable_cache_costs_only_time(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file" / "below"))
    assert fingerprint_folder(folder).startswith("sha256:")


def test_a_load_that_fails_stops_hashing(folder, monkeypatch):
    """Neither an error nor Ctrl-C waits until a large base has been read."""
    stopped = []

    def endless(path, event):
        stopped.append(event.wait(20))

    monkeypatch.setattr(loading, "fingerprint_folder", endless)
    monkeypatch.setattr(loading, "_load_tokenizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        loading.load(str(folder), device="cpu")
    assert stopped == [True]
    event = Event()
    event.set()
    with pytest.raises(BaseError, match="it was stopped"):
        fingerprint_folder(folder, event)


def test_unreadable_folder(folder):
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BaseError, match="cannot be fingerprinted"):
        fingerprint_folder(folder)


def test_model_change_is_seen_and_no_state_is_touched():
    model = tiny_model("gpt2")
    before = fingerprint_model(model)
    assert fingerprint_model(model) == before
    with torch.no_grad():
        model.transformer.h[0].ln_1.bias[3] += 1e-6
    assert fingerprint_model(model) != before


def test_views_and_scalars(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    wide = torch.randn(4, 6)
    rewrite(tmp_path, {"w": wide.t().contiguous(), "s": torch.tensor(2.0)})

    model = torch.nn.Module()
    model.config = None
    model.register_buffer("w", wide.t())
    model.register_buffer("s", torch.tensor(2.0))
    assert fingerprint_model(model) == fingerprint_folder(tmp_path)


def test_tokenizer_and_template_digests():
    a, b = tiny_tokenizer(), tiny_tokenizer()
    assert tokenizer_digest(a) == tokenizer_digest(b) and template_digest(a) == template_digest(b)
    a(["x", "longer"], padding=True)  # leaves padding switched on in the backend, which is not part of the tokenizer
    assert tokenizer_digest(a) == tokenizer_digest(b)
    b.add_tokens(["<think>"])
    assert tokenizer_digest(a) != tokenizer_digest(b)
    b.chat_template = a.chat_template + " "
    assert template_digest(a) != template_digest(b)
    b.chat_template = None
    assert template_digest(b) is None


def test_tokenizer_digest_sees_the_pre_tokenizer():
    from tokenizers import normalizers

    a, b = tiny_tokenizer(), tiny_tokenizer()
    b.backend_tokenizer.normalizer = normalizers.NFD()
    assert tokenizer_digest(a) != tokenizer_digest(b)
