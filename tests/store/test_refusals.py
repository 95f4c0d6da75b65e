"""Whatever is wrong with an adapter folder is refused by name; each test is one hostile or broken folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.store.common import read_tensors, stirred, tiny_base, write_tensors
from trimtab.errors import AdapterError
from trimtab.methods import BottleneckConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from trimtab.model import Base
from trimtab.store import Adapter

METHODS = {
    "lora": LoraConfig(r=2, target_modules=("q_proj", "v_proj")),
    "ia3": IA3Config(),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, prefix_init="RANDOM"),
    "bottleneck": BottleneckConfig(reduction_factor=8),
}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base()


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    return {name: stirred(base, method).save(root / name) for name, method in METHODS.items()}


@pytest.fixture
def ours(saved, tmp_path) -> Path:
    """A sound LoRA folder with its trimtab.json."""
    return Path(shutil.copytree(saved["lora"], tmp_path / "a"))


@pytest.fixture
def theirs(ours) -> Path:
    """The same as peft would leave it: no trimtab.json."""
    (ours / "trimtab.json").unlink()
    return ours


def refused(folder: Path, base: Base) -> str:
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder, base)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


# ---- config ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"some_future_option": 3}, "some_future_option"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"layers_pattern": "blocks", "layers_to_transform": [0]}, "layers_pattern"),
        ({"r": 0}, "r = 0"),
        ({"r": 5000}, "5000"),
        ({"r": "many"}, "r = 'many'"),
        ({"lora_alpha": 0}, "lora_alpha = 0"),
        ({"rank_pattern": {"q_proj": 999999}}, "999999"),
        ({"task_type": ["CAUSAL_LM"]}, "is no name of a task"),
        ({"bias": "some"}, "bias = 'some'"),
        ({"target_modules": ["q_proj", "v_porj"]}, "v_proj.lora_A.weight (2, 48) belongs to no module"),
        ({"target_modules": ["q_porj", "v_porj"]}, "'v_porj' matches no module (did you mean 'v_proj'?)"),
        ({"exclude_modules": "*"}, "not a regular expression"),
        ({"target_modules": "(.*)*x"}, "'(.*)*x' matches no module"),
        ({"target_modules": ".*.*.*.*.*.*.*.*.*.*!"}, "matches no module"),
        ({"rank_pattern": {r"(q)\1": 2}}, "has a back reference"),
        ({"target_modules": ["x"] * 5000}, "5,000 entries"),
        ({"target_modules": "*"}, "not a regular expression"),
        ({"peft_type": "LOHA"}, "methods there are: "),
        ({"peft_type": "LOAR"}, "did you mean 'LORA'?"),
        ({"peft_type": None}, "peft_type = None"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"peft_type": "os.system"}, "os.system"),
    ],
)
def test_config_options_that_change_the_mathematics(theirs, base, changes, said):
    edit(theirs, **changes)
    assert said in refused(theirs, base)


def test_all_config_findings_come_at_once(theirs, base):
    edit(theirs, bias="some", lora_bias=True, use_qalora=True)
    text = refused(theirs, base)
    assert all(word in text for word in ("bias = 'some'", "lora_bias", "use_qalora"))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_where_the_base_has_biases(bias, tmp_path):
    base = tiny_base("qwen2")
    folder = stirred(base, METHODS["lora"]).save(tmp_path / "a")
    (folder / "trimtab.json").unlink()
    edit(folder, bias=bias)
    assert f"bias = '{bias}': trained biases are not supported" in refused(folder, base)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
        {"task_type": None},
        {"peft_version": "0.99.0", "some_future_option": None, "another": False, "third": []},
        {"base_model_name_or_path": "../../etc/passwd", "auto_mapping": {"base_model_class": "os", "parent_library": "antigravity"}},
        {"fan_in_fan_out": True},
        {"layers_pattern": ["layers"]},
        {"rank_pattern": None, "alpha_pattern": None},
    ],
)
def test_config_options_that_change_nothing_are_accepted(theirs, base, changes):
    import sys

    edit(theirs, **changes)
    assert not Adapter.load(theirs, base).verified
    assert "antigravity" not in sys.modules, "a config caused an import"


def test_missing_keys_get_pefts_defaults_not_ours(base, tmp_path):
    stirred(base, LoraConfig(r=8, lora_alpha=8, target_modules=("q_proj", "v_proj"))).save(tmp_path / "a")
    (tmp_path / "a" / "trimtab.json").unlink()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["v_proj", "q_proj"]}))
    adapter = Adapter.load(tmp_path / "a", base)
    assert {(s.rank, s.scaling) for s in adapter.sites} == {(8, 1.0)}


def test_full_names_and_lists_in_any_order(theirs, base):
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (1, 0) for p in "vq"]
    edit(theirs, target_modules=names)
    assert {s.name for s in Adapter.load(theirs, base).sites} == set(names)


def test_modules_to_save_win_over_target_modules_as_in_peft(base, tmp_path):
    method = LoraConfig(r=2, target_modules=("v_proj",), modules_to_save=("q_proj",))
    stirred(base, method).save(tmp_path / "a")
    (tmp_path / "a" / "trimtab.json").unlink()
    edit(tmp_path / "a", target_modules=["q_proj", "v_proj"])
    assert Adapter.load(tmp_path / "a", base).sites == method.sites(base.spec)


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ("prompt", {"token_dim": 47}, "token_dim"),
        ("prompt", {"num_virtual_tokens": ...}, "num_virtual_tokens is missing"),
        ("prompt", {"num_virtual_tokens": 4}, "has shape (3, 48)"),
        ("prompt", {"num_virtual_tokens": 512}, "512 positions"),
        ("prefix", {"num_attention_heads": 4}, "num_attention_heads = 4"),
        ("prefix", {"num_layers": 3}, "num_layers"),
        ("ia3", {"feedforward_modules": []}, "has shape (1, 96)"),
        ("ia3", {"target_modules": ["k_proj"]}, "feedforward"),
        ("bottleneck", {"variant": "sideways"}, "sideways"),
        ("bottleneck", {"extra": 1}, "extra"),
    ],
)
def test_configs_of_the_other_methods(saved, base, tmp_path, method, changes, said):
    folder = Path(shutil.copytree(saved[method], tmp_path / "a"))
    (folder / "trimtab.json").unlink()
    edit(folder, **changes)
    assert said in refused(folder, base)


def test_a_projected_prefix_of_peft_loads_as_its_flat_output(saved, base, tmp_path):
    folder = Path(shutil.copytree(saved["prefix"], tmp_path / "a"))
    (folder / "trimtab.json").unlink()
    edit(folder, prefix_projection=True, encoder_hidden_size=7)
    assert Adapter.load(folder, base).method.prefix_projection is False


def test_adapterhub_is_named(theirs, base):
    (theirs / "adapter_config.json").write_text(
        json.dumps({"config": {"reduction_factor": 16}, "model_type": "llama", "version": "adapters.1.0"})
    )
    (theirs / "adapter_model.safetensors").unlink()
    (theirs / "pytorch_adapter.bin").write_bytes(b"x")
    assert "AdapterHub" in refused(theirs, base)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"peft_type": "LORA", "r": 2, "r": 4}', "'r' more than once"),
        ('{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}', "'a' more than once"),
        ("[1]", "list where a JSON object belongs"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "finite"),
        ("{", "not readable JSON"),
        ("[" * 200000, "not readable JSON"),
        ('{"r": ' + "9" * 5000 + "}", "not readable JSON"),
        ('{"a": "' + "x" * 2**20 + '"}', "at most 1,048,576"),
        (b"\xff\xfe", "not readable JSON"),
    ],
    ids=range(10),
)
def test_json_with_a_second_meaning_or_none(theirs, base, text, said):
    (theirs / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in refused(theirs, base)


# ---- the folder ----


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles(theirs, base, name):
    """Beside the safetensors they are not opened; alone they are refused."""
    (theirs / name).write_bytes(b"cos\nabort\n(tR.")
    assert f"{name} is a pickle and is not read" in Adapter.load(theirs, base).warnings[0]
    (theirs / "adapter_model.safetensors").unlink()
    text = refused(theirs, base)
    assert "is a pickle" in text and "adapter_model.safetensors is missing" in text


def test_shards_are_named(theirs, base):
    (theirs / "adapter_model.safetensors").rename(theirs / "adapter_model-00001-of-00001.safetensors")
    assert "adapter_model-00001-of-00001.safetensors is part of an adapter in shards" in refused(theirs, base)


def test_a_pickle_and_a_zip_under_the_name_of_safetensors(theirs, base):
    file = theirs / "adapter_model.safetensors"
    torch.save({"a": torch.zeros(100)}, file)
    assert "zip archive" in refused(theirs, base)
    torch.save({"a": torch.zeros(100)}, file, _use_new_zipfile_serialization=False)
    assert "pickle" in refused(theirs, base)


def test_archives_and_files_in_place_of_a_folder(theirs, base, tmp_path):
    archive = tmp_path / "adapter.zip"
    with zipfile.ZipFile(archive, "w") as z:
        z.write(theirs / "adapter_config.json", "adapter_config.json")
    assert "archive" in refused(archive, base)
    assert "is a file" in refused(theirs / "adapter_model.safetensors", base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "trimtab.json"])
def test_symbolic_links(ours, base, tmp_path, name):
    (ours / name).rename(tmp_path / name)
    (ours / name).symlink_to(tmp_path / name)
    assert f"{name} is a symbolic link" in refused(ours, base)


def test_a_link_to_a_folder(ours, base, tmp_path):
    (tmp_path / "link").symlink_to(ours)
    assert "symbolic link" in refused(tmp_path / "link", base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "trimtab.json"])
def test_pipes_and_folders_in_place_of_files(ours, base, name):
    (ours / name).unlink()
    os.mkfifo(ours / name)
    assert f"{name} is not a regular file" in refused(ours, base)
    (ours / name).unlink()
    (ours / name).mkdir()
    assert f"{name} is not a regular file" in refused(ours, base)


def test_other_files_are_not_read(ours, base):
    with (ours / "optimizer.pt").open("wb") as file:
        file.truncate(2**40)  # a terabyte, sparse
    (ours / "training_args.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    assert Adapter.load(ours, base).verified


def test_an_empty_folder(base, tmp_path):
    (tmp_path / "a").mkdir()
    text = refused(tmp_path / "a", base)
    assert "adapter_config.json is missing" in text and "adapter_model.safetensors is missing" in text


# ---- tensors ----


def test_missing_left_over_and_misshaped_tensors_come_at_once(theirs, base):
    def change(tensors):
        del tensors[f"{Q}.lora_A.weight"]
        tensors["base_model.model.nowhere.lora_A.weight"] = torch.ones(2, 2)
        tensors[f"{Q}.lora_B.weight"] = torch.ones(48, 3)

    edit_tensors(theirs, change)
    text = refused(theirs, base)
    assert f"{Q}.lora_A.weight is missing" in text
    assert "nowhere.lora_A.weight (2, 2) belongs to no module" in text
    assert f"{Q}.lora_B.weight has shape (48, 3); the config and this base ask for (48, 2)" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(theirs, base, value):
    edit_tensors(theirs, lambda tensors: tensors[f"{Q}.lora_A.weight"][0, :3].fill_(value))
    assert f"{Q}.lora_A.weight has 3 values of 96 that are not finite" in refused(theirs, base)


def test_values_that_are_not_finite_are_not_saved(base, tmp_path):
    adapter = stirred(base, METHODS["lora"])
    next(iter(adapter.params.values()))[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="not finite"):
        adapter.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_zeros(theirs, base):
    edit_tensors(theirs, lambda tensors: [t.zero_() for t in tensors.values()])
    assert "all 8 tensors are zero" in refused(theirs, base)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_dtypes_off_the_list(theirs, base, dtype):
    edit_tensors(theirs, lambda tensors: tensors.update({f"{Q}.lora_A.weight": tensors[f"{Q}.lora_A.weight"].to(dtype)}))
    assert "allowed are F32, F16, BF16" in refused(theirs, base)


def test_the_bases_own_embedding_is_ignored_and_another_one_refused(base, tmp_path):
    folder = stirred(base, LoraConfig(r=2, target_modules=("embed_tokens", "q_proj"))).save(tmp_path / "a")
    (folder / "trimtab.json").unlink()
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    weight = base.model.get_parameter("model.embed_tokens.weight").detach().clone()
    edit_tensors(folder, lambda tensors: tensors.update({key: weight}))
    assert len(Adapter.load(folder, base).params) == 2 * 3
    edit_tensors(folder, lambda tensors: tensors[key][0].add_(1))
    assert "is not the base's own model.embed_tokens.weight" in refused(folder, base)


# ---- the safetensors header ----

ENTRY = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"../../x": ENTRY}, 8, "not a name"),
        ({"a/b": ENTRY}, 8, "not a name"),
        ({"": ENTRY}, 8, "not a name"),
        ({"a..b": ENTRY}, 8, "not a name"),
        ({"a" * 600: ENTRY}, 8, "not a name"),
        (b'{"a": {}, "a": {}}', 8, "'a' more than once"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', 8, "'dtype' more than once"),
        ({"a": ENTRY | {"shape": [0, 2], "data_offsets": [0, 0]}}, 0, "dimension of zero"),
        ({"a": ENTRY | {"shape": [2**47, 2**47], "data_offsets": [0, 8]}}, 8, "do not fit"),
        ({"a": ENTRY | {"shape": [-1, -2]}}, 8, "one to four sizes"),
        ({"a": ENTRY | {"shape": [True, 2]}}, 8, "one to four sizes"),
        ({"a": ENTRY | {"shape": []}}, 8, "one to four sizes"),
        ({"a": ENTRY | {"shape": [1] * 5}}, 8, "one to four sizes"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, 8, "do not fit"),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, 8, "do not fit"),
        ({"a": ENTRY | {"data_offsets": [0, 8, 9]}}, 8, "do not fit"),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, 16, "leaves 8 unused bytes"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, 12, "overlaps"),
        ({"a": ENTRY, "b": ENTRY}, 8, "overlaps"),
        ({"a": ENTRY}, 4, "truncated"),
        ({"a": ENTRY}, 9, "1 bytes behind its last tensor"),
        ({"a": ENTRY | {"more": 1}}, 8, "exactly dtype, shape and data_offsets"),
        ({"a": 3}, 8, "exactly dtype, shape and data_offsets"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, 8, "allowed are"),
        ({"__metadata__": {"format": 1}, "a": ENTRY}, 8, "__metadata__"),
        ([], 0, "list where a JSON object belongs"),
        (b"{" + b" " * 2**20 + b"}", 0, "more than the 1,048,576 allowed"),
        ({}, 0, "is missing"),
    ],
    ids=range(28),
)
def test_headers(theirs, base, header, data, said):
    write_tensors(theirs / "adapter_model.safetensors", header, bytes(data))
    assert said in refused(theirs, base)


@pytest.mark.parametrize(
    ("length", "said"),
    [(2**63, "more than the 1,048,576"), (10**6, "truncated"), (1, "not readable JSON"), (0, "not readable JSON")],
)
def test_header_lengths_that_lie(theirs, base, length, said):
    header, data = read_tensors(theirs / "adapter_model.safetensors")
    write_tensors(theirs / "adapter_model.safetensors", header, data, length=length)
    assert said in refused(theirs, base)


def test_files_cut_anywhere(theirs, base):
    file = theirs / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(theirs, base)


def test_a_huge_file_is_refused_from_its_header(theirs, base):
    """A terabyte that the header even accounts for: the shape is wrong, so that none of it is read."""
    file = theirs / "adapter_model.safetensors"
    write_tensors(file, {f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [2**18, 2**20], "data_offsets": [0, 2**40]}})
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size + 2**40)
    assert "ask for (2, 48)" in refused(theirs, base)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_gives_our_error_or_the_same_shapes(saved, base, tmp_path_factory, data):
    """Bytes changed anywhere in any file: what loads has the right shapes and finite values, what does not is refused by AdapterError."""
    folder = Path(shutil.copytree(saved["lora"], tmp_path_factory.mktemp("fuzz") / "a"))
    (folder / "trimtab.json").unlink()
    file = folder / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(len(raw), 2000) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(raw))
    try:
        adapter = Adapter.load(folder, base)
    except AdapterError:
        return
    assert all(bool(torch.isfinite(t).all()) for t in adapter.params.values())


# ---- trimtab.json: the right base, template and files ----


def test_another_base(ours, base):
    other = tiny_base(seed=1, fingerprint="sha256:other")
    text = refused(ours, other)
    assert "sha256:tiny" in text and "sha256:other" in text
    assert "does not fit this base" in refused(ours, tiny_base("gpt2", fingerprint="sha256:other"))


def test_another_template_and_another_tokenizer(ours, base):
    other = tiny_base()
    other.tokenizer.chat_template = other.tokenizer.chat_template.replace("assistant", "helper")
    text = refused(ours, other)
    assert "chat_template" in text and "prompts would not look as they did in training" in text
    other = tiny_base()
    other.tokenizer.add_tokens(["<|new|>"])
    assert "tokenizer: it was trained with" in refused(ours, other)


def test_a_base_without_template_or_name_takes_it_unverified(ours):
    bare = tiny_base(fingerprint="")
    bare.tokenizer = None
    assert not Adapter.load(ours, bare).verified


def test_a_note_without_fingerprint_vouches_for_nothing(base, tmp_path):
    nameless = tiny_base(fingerprint="")
    folder = stirred(nameless, METHODS["lora"]).save(tmp_path / "a")
    assert not Adapter.load(folder, base).verified
    assert not Adapter.load(folder, nameless).verified, "that neither side knows a fingerprint is no agreement"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_not_those_that_were_saved(ours, base, name):
    raw = (ours / name).read_bytes()
    (ours / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]) if name.endswith("tensors") else raw + b" ")
    text = refused(ours, base)
    assert name in text and "trimtab.json records" in text


def _restamp(folder: Path) -> None:
    note = json.loads((folder / "trimtab.json").read_text())
    note["files"] = {n: "sha256:" + hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in note["files"]}
    (folder / "trimtab.json").write_text(json.dumps(note))


def test_config_and_note_that_describe_different_adapters(ours, base):
    """Other programs read only the config: an adapter must not do one thing here and another there."""
    edit(ours, lora_alpha=400)
    _restamp(ours)
    assert "describe different adapters" in refused(ours, base)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format 2"),
        ({"peft_type": "NEW"}, "'NEW'"),
        ({"fields": {"r": 2, "rr": 3}}, "unknown key 'rr'"),
        ({"fields": None}, "names no method"),
        ({"files": None}, "records no digests"),
        ({"base": 3}, None),
    ],
)
def test_notes_that_make_no_sense(ours, base, changes, said):
    note = json.loads((ours / "trimtab.json").read_text()) | changes
    (ours / "trimtab.json").write_text(json.dumps(note))
    if said is None:
        assert not Adapter.load(ours, base).verified
    else:
        assert said in refused(ours, base)
