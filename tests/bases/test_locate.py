"""From a name to a folder, and what is said where there is none."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.bases import load, locate
from trimtab.errors import BaseError, ConfigError


def silent(message):
    pass


@pytest.fixture
def folder(tiny_llama_folder, tmp_path, own_cache):
    return shutil.copytree(tiny_llama_folder, tmp_path / "base")


def refusal(name) -> str:
    with pytest.raises(BaseError) as caught:
        locate(str(name), silent)
    return str(caught.value)


def test_folder_is_found_and_loaded(folder):
    base = load(str(folder), dtype="auto", device="cpu")
    assert (base.name, base.path, base.dtype, base.device.type) == (str(folder), folder, torch.float32, "cpu")
    assert base.fingerprint.startswith("sha256:") and not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer.decode(base.tokenizer.encode("hello")) == "hello"


def test_relative_and_home_paths(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("base", silent) == locate("./base", silent) == locate("~/base", silent) == folder


def test_sharded_folder(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({n: tensors[n] for n in held}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {n: f for f, held in shards.items() for n in held}})
    )
    (folder / "model.safetensors").unlink()
    assert load(str(folder), device="cpu").path == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "missing shard model-00002-of-00002.safetensors" in refusal(folder)


def test_index_may_not_point_outside(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    assert "outside the folder" in refusal(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not readable JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "where a JSON object belongs"),
        (lambda f: (f / "config.json").write_text("{}"), "names no model_type"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle (pytorch_model.bin)"),
        (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-5]), "truncated"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("nothing"), "tokenizer.json is not readable JSON"),
    ],
)
def test_spoilt_folder_is_refused_with_the_reason(folder, spoil, said):
    spoil(folder)
    text = refusal(folder)
    assert said in text and "the folder holds: " in text and str(folder) in text


def test_every_problem_is_listed_at_once(folder):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).unlink()
    text = refusal(folder)
    assert "no config.json" in text and "no weights" in text and "no tokenizer" in text


def test_adapter_folder_is_recognised(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter's folder, not a base's" in refusal(tmp_path)


def test_missing_weights_are_refused_not_invented(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"missing tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(folder), device="cpu")


def test_code_in_a_folder_is_never_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "no-such-model", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match="code that comes with a model is never run"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["no/such-model-anywhere", "nothing", "./nowhere", "a/b/c"])
def test_unknown_name_says_what_was_tried(name, own_cache):
    text = refusal(name)
    assert repr(name) in text and "smollm2-135m-instruct" in text and "folder with config.json" in text


def test_offline_hub_id_says_so(own_cache):
    assert "HF_HUB_OFFLINE is set" in refusal("no/such-model-anywhere")


def test_misspelt_bundled_name():
    assert "did you mean 'smollm2-135m-instruct'?" in refusal("SmolLM2-135-instruct")


def test_missing_gguf_and_plain_file(tmp_path):
    assert "there is no GGUF file" in refusal(tmp_path / "x.gguf")
    (tmp_path / "weights.txt").write_text("x")
    assert "is a file, not a base" in refusal(tmp_path / "weights.txt")
    (tmp_path / "y.gguf").write_bytes(b"nope")
    assert "not a GGUF file" in refusal(tmp_path / "y.gguf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.bfloat16])
def test_dtypes(folder, dtype):
    base = load(str(folder), dtype=dtype, device="cpu")
    assert str(base.dtype).endswith(str(dtype).removeprefix("torch."))
    assert {p.dtype for p in base.model.parameters()} == {base.dtype}


def test_wrong_dtype_and_device(folder):
    with pytest.raises(ConfigError, match=r"did you mean 'bfloat16'(.|\n)*float32, bfloat16, float16, auto"):
        load(str(folder), dtype="bfloat")
    with pytest.raises(ConfigError, match="cpu, cuda"):
        load(str(folder), device="mps")
    with pytest.raises(ConfigError, match="not one that torch knows"):
        load(str(folder), device="gpu")
    with pytest.raises(ConfigError, match="CUDA devices"):
        load(str(folder), device="cuda:99")
