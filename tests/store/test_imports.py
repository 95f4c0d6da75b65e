"""Folders of AdapterHub's and of older peft's: carried over with equal logits, or refused with what cannot be."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.laws.common import one_thread
from tests.store.common import EXAMPLES, SEQUENCES, stirred, tiny_base, write_tensors
from tests.tiny import tiny_folder
from trimtab.errors import AdapterError
from trimtab.methods import BottleneckConfig, IA3Config, LoraConfig, PromptTuningConfig
from trimtab.store import Adapter
from trimtab.store.imports import CONVERT, import_folder
from trimtab.store.keys import modern

__all__ = ["one_thread"]

IN_PEFT = [(name, m) for name, m in EXAMPLES if type(m).in_peft]


@pytest.fixture(scope="module")
def base():
    return tiny_base()


# ---- AdapterHub ----

BN = {
    "mh_adapter": True,
    "output_adapter": True,
    "reduction_factor": 5,
    "non_linearity": "swish",
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "init_weights_seed": None,
    "is_parallel": False,
    "scaling": 1.5,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.1,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
    "stochastic_depth": 0.0,
}
LORA = {
    "architecture": "lora",
    "selfattn_lora": True,
    "intermediate_lora": False,
    "output_lora": False,
    "leave_out": [],
    "r": 4,
    "alpha": 12,
    "dropout": 0.0,
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "init_weights": "lora",
    "init_weights_seed": None,
    "use_gating": False,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
    "dtype": None,
}


def hub_folder(folder: Path, options: dict[str, Any], tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """A folder as `adapters` 1.3 writes one."""
    folder.mkdir()
    config = {"config": options, "hidden_size": 48, "model_class": "LlamaForCausalLM", "model_name": "tiny", "model_type": "llama"}
    config |= {"name": "mine", "version": "adapters.1.3.0"} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter.safetensors")
    return folder


def hub_name(key: str) -> str:
    """AdapterHub's name of one of our bottleneck tensors on Llama."""
    module, _, tensor = key.rpartition(".adapter_")
    place = {"o_proj": "attention_adapters", "mlp": "output_adapters"}[module.rpartition(".")[2]]
    return (
        f"{module.replace('.self_attn.o_proj', '').replace('.mlp', '')}.{place}.adapters.mine.adapter_{tensor.replace('down.', 'down.0.')}"
    )


@pytest.fixture
def houlsby(base) -> Adapter:
    return stirred(base, BottleneckConfig(reduction_factor=5, non_linearity="silu", scaling=1.5))


def hub_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {hub_name(k): t for k, t in adapter.params.items()}


def test_a_houlsby_adapter_is_carried_over_as_it_is(base, houlsby, tmp_path):
    imported = import_folder(hub_folder(tmp_path / "a", BN, hub_tensors(houlsby)), base)
    assert imported.source == "adapterhub" and len(imported.changes) == 1 and "dropout = 0.1" in imported.changes[0]
    assert imported.adapter.sites == houlsby.sites and not imported.adapter.verified
    assert all(torch.equal(imported.adapter.params[k], t) for k, t in houlsby.params.items())
    imported.adapter.save(tmp_path / "ours")
    assert Adapter.load(tmp_path / "ours", base).sites == houlsby.sites


def test_a_lora_is_carried_over_with_its_scaling(base, tmp_path):
    adapter = stirred(base, LoraConfig(r=4, lora_alpha=12, target_modules=("q_proj", "v_proj")))
    names = {"lora_A.weight": "loras.mine.lora_A", "lora_B.weight": "loras.mine.lora_B"}
    tensors = {s.key(t).replace(t, names[t]): adapter.params[s.key(t)] for s in adapter.sites for t in s.shapes}
    imported = import_folder(hub_folder(tmp_path / "a", LORA, tensors), base)
    assert {s.name for s in imported.adapter.sites} == {s.name for s in adapter.sites} and imported.changes == ()
    ours, theirs = (base.logits(SEQUENCES, adapters=[a] * 3) for a in (imported.adapter, adapter))
    assert all(float((a - b).abs().max()) < 1e-4 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"original_ln_before": True}, "original_ln_before = 'True': its input is the sub-layer's output plus the residual"),
        ({"is_parallel": True}, "reads what the MLP reads"),
        ({"ln_after": True}, "a layer norm of its own behind"),
        ({"original_ln_after": False}, "the residual around the sub-layer is left out"),
        ({"residual_before_ln": "post_add"}, "taken elsewhere"),
        ({"inv_adapter": "nice"}, "invertible"),
        ({"phm_layer": True}, "Kronecker"),
        ({"use_gating": True}, "gate"),
        ({"cross_adapter": True}, "cross-attention"),
        ({"scaling": "learned"}, "learnt scaling"),
        ({"reduction_factor": {"0": 2, "default": 4}}, "one number for all layers"),
        ({"scaling": 0.0}, "other than 0"),
        ({"non_linearity": "gelu_new"}, "non_linearity = 'gelu_new'"),
        ({"non_linearity": ["relu"]}, "non_linearity = "),
        ({"leave_out": [0, 1]}, "leaves no layer"),
        ({"mh_adapter": False, "output_adapter": False}, "neither"),
        ({"brand_new": 3}, "brand_new = '3' is not known here"),
        ({"architecture": "prefix_tuning"}, "only bottleneck adapters, LoRA"),
    ],
)
def test_what_cannot_be_carried_over_is_named(base, houlsby, change, words, tmp_path):
    with pytest.raises(AdapterError) as e:
        import_folder(hub_folder(tmp_path / "a", BN | change, hub_tensors(houlsby)), base)
    assert words in str(e.value) and len(e.value.problems) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"vera_d": 0.1}, "VeRA"),
        ({"r": "4"}, "r = '4'"),
        ({"r": 4.5}, "a whole number"),
        ({"attn_matrices": ["x"]}, "attn_matrices"),
    ],
)
def test_loras_that_cannot_be_carried_over(base, change, words, tmp_path):
    with pytest.raises(AdapterError, match=words):
        import_folder(hub_folder(tmp_path / "a", LORA | change, {"x": torch.ones(1)}), base)


def test_every_reason_is_listed_at_once(base, houlsby, tmp_path):
    folder = hub_folder(
        tmp_path / "a", BN | {"ln_before": True, "is_parallel": True}, hub_tensors(houlsby), model_type="bert", version="3.2.1"
    )
    (folder / "pytorch_model_head.bin").write_bytes(b"\x80")
    with pytest.raises(AdapterError) as e:
        import_folder(folder, base)
    assert len(e.value.problems) == 5 and "use_safetensors=True" in e.value.fix


def test_a_pickle_of_theirs_is_refused_with_the_call_that_avoids_it(base, tmp_path):
    folder = hub_folder(tmp_path / "a", BN, {"x": torch.ones(1)})
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(AdapterError) as e:
        import_folder(folder, base)
    assert (
        "pytorch_adapter.bin is a pickle" in str(e.value)
        and "save_adapter(folder, name, with_head=False, use_safetensors=True)" in e.value.fix
    )


def test_a_head_must_be_the_bases_own(base, houlsby, tmp_path):
    folder = hub_folder(tmp_path / "a", BN, hub_tensors(houlsby))
    head = base.model.lm_head.weight.detach().clone()
    save_file({"lm_head.weight": head}, folder / "model_head.safetensors")
    assert import_folder(folder, base).source == "adapterhub"
    save_file({"lm_head.weight": head * 1.01}, folder / "model_head.safetensors")
    with pytest.raises(AdapterError, match="a trained head is not carried over"):
        import_folder(folder, base)


@pytest.mark.parametrize("damage", ["missing", "left-over", "shape", "nan", "empty", "truncated"])
def test_tensors_that_do_not_belong_are_refused(base, houlsby, damage, tmp_path):
    tensors = hub_tensors(houlsby)
    name = next(iter(tensors))
    edits: dict[str, Callable[[], Any]] = {
        "missing": lambda: tensors.pop(name),
        "left-over": lambda: tensors.update({"model.layers.9.x": torch.ones(2)}),
        "shape": lambda: tensors.update({name: torch.ones(3, 3)}),
        "nan": lambda: tensors.update({name: tensors[name] * float("nan")}),
        "empty": lambda: tensors.clear(),
        "truncated": lambda: None,
    }
    edits[damage]()
    folder = hub_folder(tmp_path / "a", BN, tensors)
    if damage == "truncated":
        file = folder / "adapter.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
    words = {"missing": "is missing", "left-over": "belongs to no module", "shape": "has shape", "nan": "not finite"}
    with pytest.raises(AdapterError, match=words.get(damage, "missing|truncated")):
        import_folder(folder, base)


def test_mutated_folders_are_refused_or_mean_the_same(base, houlsby, tmp_path):
    """Values of the config and bytes of the weights changed at random: never a crash, and what is taken computes what its file says."""
    rng, odd = random.Random(0), [None, True, False, 0, -1, 2, 0.5, 1e300, "", "relu", "lora", [], [0], {}, {"0": 2}]
    folder, taken = hub_folder(tmp_path / "a", BN, hub_tensors(houlsby)), 0
    config, weights = json.loads((folder / "adapter_config.json").read_text()), (folder / "adapter.safetensors").read_bytes()
    for _ in range(400):
        mutant, data = json.loads(json.dumps(config)), bytearray(weights)
        where = mutant["config"] if rng.random() < 0.7 else mutant
        where[rng.choice(list(where))] = rng.choice(odd)
        if rng.random() < 0.3:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / "adapter_config.json").write_text(json.dumps(mutant))
        (folder / "adapter.safetensors").write_bytes(data)
        try:
            adapter = import_folder(folder, base).adapter
        except AdapterError:
            continue
        taken += 1
        stored = load_file(folder / "adapter.safetensors")
        assert all(torch.equal(t, stored[hub_name(k)]) for k, t in adapter.params.items() if hub_name(k) in stored)
        assert adapter.method.scaling == mutant["config"]["scaling"]
    assert 20 < taken < 300


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_folders_of_the_real_package_give_its_logits(family, tmp_path, record_property):
    """What `adapters` writes and computes, by an interpreter that has it; its Pfeiffer and parallel adapters are refused."""
    python = os.environ.get("TRIMTAB_ADAPTERHUB_PYTHON")
    if not python:
        pytest.skip("TRIMTAB_ADAPTERHUB_PYTHON names no interpreter that has the `adapters` package (1.x)")
    model = tiny_folder(tmp_path / "base", family)
    make = Path(__file__).parent / "adapterhub_make.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    made = subprocess.run([python, make, model, tmp_path], env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    base, refused = tiny_base(family), {"pfeiffer": "plus the residual", "parallel": "reads what the MLP reads"}
    for name, words in refused.items():
        with pytest.raises(AdapterError, match=words):
            import_folder(tmp_path / name, base)
    for name in ("houlsby", "sequential", "attention", "lora", "ia3"):
        imported = import_folder(tmp_path / name, base)
        want = load_file(tmp_path / f"{name}.safetensors")["logits"][0]
        got = base.logits([SEQUENCES[0]], adapters=[imported.adapter])[0]
        record_property(name, apart := float((got - want).abs().max()))
        assert apart < 1e-4, name
        assert float((base.logits([SEQUENCES[0]])[0] - want).abs().max()) > 0.05, "the adapter must matter"


def test_a_huge_file_of_theirs_is_refused_before_it_is_read(base, houlsby, tmp_path):
    """A sound header and a terabyte that takes no room."""
    folder, size = hub_folder(tmp_path / "a", BN, hub_tensors(houlsby)), 2**40
    write_tensors(folder / "adapter.safetensors", {"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    os.truncate(folder / "adapter.safetensors", size + 100)
    with pytest.raises(AdapterError, match=r"adapter.safetensors has 1,099,511,627,876 bytes; at most"):
        import_folder(folder, base)


# ---- peft ----


def of_old(key: str) -> str:
    """The name that a state dict of peft's model has for a tensor of its files."""
    if key == "prompt_embeddings":
        return "module.prompt_encoder.default.embedding.weight"
    for own in ("lora_A", "lora_B"):
        key = key.replace(f".{own}.weight", f".{own}.default.weight")
    for own in ("lora_embedding_A", "lora_embedding_B", "ia3_l"):
        key = key.replace(f".{own}", f".{own}.default")
    return key.replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")


@pytest.mark.parametrize(("name", "method"), IN_PEFT, ids=[name for name, _ in IN_PEFT])
def test_names_of_old_are_read(base, name, method, tmp_path):
    adapter = stirred(base, method)
    adapter.save(tmp_path / "a")
    (tmp_path / "a" / "trimtab.json").unlink()
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({of_old(k): t for k, t in tensors.items()}, file)
    imported = import_folder(tmp_path / "a", base)
    assert imported.source == "peft" and "the names that peft writes today" in imported.changes[0] and not imported.adapter.verified
    assert {modern(of_old(k)): 0 for k in tensors} == dict.fromkeys(tensors, 0)
    assert all(torch.equal(imported.adapter.params[k], t) for k, t in method.export(adapter.params)[1].items())


@pytest.mark.parametrize("wrap", ["module.{}", "base_model.model._orig_mod.{}", "{}"])
def test_wrappers_around_names_are_taken_away(base, wrap, tmp_path):
    """Data-parallel and compiled models, and files that lack the prefix; a module trained in full with its frozen original beside it."""
    adapter = stirred(base, LoraConfig(r=2, modules_to_save=("lm_head",)))
    adapter.save(tmp_path / "a")
    (tmp_path / "a" / "trimtab.json").unlink()
    file, prefix = tmp_path / "a" / "adapter_model.safetensors", "base_model.model."
    tensors = {wrap.format(k.removeprefix(prefix)): t for k, t in load_file(file).items()}
    saved = tensors.pop(wrap.format("lm_head.weight"))
    tensors |= {wrap.format("lm_head.modules_to_save.default.weight"): saved}
    tensors |= {wrap.format("lm_head.original_module.weight"): base.model.lm_head.weight.detach().clone()}
    save_file(tensors, file)
    imported = import_folder(tmp_path / "a", base)
    assert all(torch.equal(imported.adapter.params[k], t) for k, t in adapter.params.items())
    tensors[wrap.format("lm_head.original_module.weight")] += 0.1
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="is not the base's own"):
        import_folder(tmp_path / "a", base)


def test_todays_folders_are_loaded_as_they_are(base, tmp_path):
    adapter = stirred(base, LoraConfig(r=2))
    adapter.save(tmp_path / "a")
    imported = import_folder(tmp_path / "a", base)
    assert imported.adapter.verified and imported.changes == () and imported.source == "peft"


def test_several_adapters_in_one_file_are_refused(base, tmp_path):
    adapter = stirred(base, PromptTuningConfig(num_virtual_tokens=3))
    adapter.save(tmp_path / "a")
    (tmp_path / "a" / "trimtab.json").unlink()
    file = tmp_path / "a" / "adapter_model.safetensors"
    table = load_file(file)["prompt_embeddings"]
    save_file({f"prompt_encoder.{n}.embedding.weight": table.clone() for n in ("one", "two")}, file)
    with pytest.raises(AdapterError, match="several adapters: one, two"):
        import_folder(tmp_path / "a", base)
    save_file({"prompt_encoder.one.embedding.weight": table, "prompt_embeddings": table.clone()}, file)
    with pytest.raises(AdapterError, match="are both prompt_embeddings"):
        import_folder(tmp_path / "a", base)


def test_a_pickle_of_pefts_is_refused_with_a_command_that_converts_it(base, tmp_path):
    """And the command does it."""
    adapter = stirred(base, IA3Config())
    folder = adapter.save(tmp_path / "a")
    (folder / "trimtab.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError) as e:
        import_folder(folder, base)
    assert CONVERT in e.value.fix
    command = f"{CONVERT}; rm adapter_model.bin".replace("python -c", f"{sys.executable} -c")
    subprocess.run(command, shell=True, cwd=folder, check=True)
    imported = import_folder(folder, base)
    assert all(torch.equal(imported.adapter.params[k], t) for k, t in adapter.params.items())
