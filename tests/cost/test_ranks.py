"""Plans for devices: by hand from data sheets' figures, against torch's own count of FLOPs, and through the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny_model
from tests.train.common import METHODS, run_file
from trimtab.bases.shapes import Architecture, read_architecture
from trimtab.bases.structure import read_spec
from trimtab.cli.plan import plan as command
from trimtab.cost.devices import BY_NAME, DEVICES, find_device
from trimtab.cost.estimate import flops_per_token
from trimtab.cost.plan import plan
from trimtab.cost.ranks import LINK_SHARE, USABLE, RanksPlan, attention_flops, plan_ranks, trainee
from trimtab.cost.replica import READ_SHARES, plan_replica
from trimtab.errors import ConfigError
from trimtab.methods import FullConfig, LoraConfig, Method

H100 = BY_NAME["h100-80gb"]
QV = LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
TRAINABLE = 8_388_608
"""Of QV on llama-2-7b."""
A_TOKEN = 4 * (6_738_415_616 - 32000 * 4096) + 6 * TRAINABLE + 3.5 * 32 * 32 * 256 * 512
"""FLOPs of a token of a row of 512: all weights but the embedding; the adapter; attention's scores and sums over half of the row."""


@pytest.fixture(scope="module")
def llama() -> Architecture:
    return read_architecture("llama-2-7b")


def planned(base: Architecture, ranks: int, method: Method = QV, tokens: int = 4096, *, trainable: int = TRAINABLE, **more) -> RanksPlan:
    again = more.get("again", False)
    one = trainee(base, method, optimizer="adamw", head=None, trainable=trainable, tokens_per_step=tokens, length=512, again=again)
    return plan_ranks(base, [one], H100, ranks=ranks, dtype=torch.bfloat16, max_tokens=4096, longest=512, **more)


# ---- figures


def test_the_table_has_data_sheets_figures_of_one_direction_and_without_sparsity() -> None:
    assert (H100.memory_bytes, H100.flops, H100.read_bytes, H100.link_bytes) == (80e9, 989e12, 3350e9, 450e9)
    a100 = BY_NAME["a100-40gb"]
    assert (a100.memory_bytes, a100.flops, a100.read_bytes, a100.link_bytes) == (40e9, 312e12, 1555e9, 300e9)
    for d in DEVICES:
        assert d.source.startswith(("NVIDIA ", "AMD ")) and d.name.endswith(f"-{d.memory_bytes / 1e9:.0f}gb")


def test_this_machine_is_measured() -> None:
    spec = read_spec(tiny_model("llama"))
    cpu = find_device("cpu", spec, torch.float32, ranks=2)
    assert cpu.memory_bytes * 2 == psutil.virtual_memory().total
    assert 1e9 < cpu.flops < 1e14 and 1e8 < cpu.read_bytes < 1e12 and 1e7 < cpu.link_bytes < 1e12
    assert "measured here" in cpu.source


def test_ranks_of_this_machine_share_its_speed(llama: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many ranks compute no faster together than the machine does, and so many replicas read no faster."""
    measured = {"probe_flops": 8e12, "read_speed": 4e10, "socket_speed": 1e9}
    for name, value in measured.items():
        monkeypatch.setattr(f"trimtab.cost.devices.{name}", lambda *_, value=value: value)
    alone, part = (find_device("cpu", llama.spec, torch.bfloat16, ranks=n) for n in (1, 4))
    assert (alone.flops, alone.read_bytes, part.flops, part.read_bytes, part.link_bytes) == (8e12, 4e10, 2e12, 1e10, 1e9)
    assert "1/4 of its memory and speed" in part.source and "ranks" not in alone.source
    one = trainee(llama, QV, optimizer="adamw", head=None, trainable=TRAINABLE, tokens_per_step=4096, length=512, again=False)
    roomy = dataclasses.replace(part, memory_bytes=1e12)
    found = plan_ranks(llama, [one], roomy, ranks=4, dtype=torch.bfloat16, max_tokens=4096, longest=512, shares=(0.4, 0.4))
    ring = 2 * 4 * TRAINABLE * 3 / 4 / (LINK_SHARE * 1e9)
    assert (found.tokens_per_s["whole"] or ())[0] == pytest.approx(4096 / (4096 * A_TOKEN / (0.4 * 8e12) + ring))


def test_an_unknown_device_is_refused_with_the_nearest(llama: Architecture) -> None:
    with pytest.raises(ConfigError, match=r"h100-80g: .* \(did you mean 'h100-80gb'\?\)"):
        find_device("h100-80g", llama.spec, torch.bfloat16)


# ---- FLOPs, as torch counts them


@pytest.mark.parametrize(("method", "factor"), [(FullConfig(), 6), (QV, 4)])
def test_flops_of_linear_layers_are_torchs(method: Method, factor: int) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    spec = read_spec(model)
    base = Architecture("tiny", spec, spec.num_parameters, torch.float32)
    embeddings = torch.randn(3, 20, spec.hidden_size, requires_grad=True)
    model.requires_grad_(factor == 6)
    with FlopCounterMode(display=False) as counted:
        model(inputs_embeds=embeddings).logits.sum().backward()
    linear = sum(n for op, n in counted.get_flop_counts()["Global"].items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    norms = sum(math.prod(shape) for m in spec.modules.values() if m.kind == "norm" for shape in m.parameters.values())
    assert linear == 3 * 20 * (flops_per_token(base, method, 0, 1.0) - factor * norms)  # of weights that nothing is multiplied with


def test_flops_of_experts_are_those_that_a_token_is_sent_to() -> None:
    """2 of 4 experts in each layer, as torch counts what transformers' own model computes; a decode step reads those alone as well."""
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation("eager")  # whose products torch counts
    spec = read_spec(model)
    base = Architecture("tiny", spec, spec.num_parameters, torch.float32)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(inputs_embeds=torch.randn(1, 20, spec.hidden_size))
    ops = counted.get_flop_counts()["Global"]
    products = sum(n for op, n in ops.items() if "bmm" not in str(op) and "attention" not in str(op))
    norms = sum(math.prod(s) for m in spec.modules.values() if m.kind == "norm" for s in m.parameters.values())
    assert spec.experts_per_token == 2
    assert products == 20 * (flops_per_token(base, QV, 0, 1.0) / 2 - 2 * norms)
    one = sum(m.experts * m.in_features * m.out_features for m in spec.modules.values() if m.kind == "experts")
    assert (spec.idle_parameters(), spec.idle_parameters(2), spec.idle_parameters(50)) == (one // 2, one // 4, 0)


def test_an_adapter_on_experts_computes_at_those_that_a_token_is_sent_to() -> None:
    spec = read_spec(tiny_model("qwen3_moe"))
    base = Architecture("tiny", spec, spec.num_parameters, torch.float32)
    method = LoraConfig(r=4, target_modules=(), target_parameters=("experts.down_proj",))
    numbers = 2 * 4 * 4 * (32 + 48)  # layers, experts, r, sides
    assert flops_per_token(base, method, numbers, 1.0) == 4 * (flops_per_token(base, QV, 0, 1.0) / 4) + 6 * numbers // 2


def test_flops_of_attention_are_half_of_torchs_full_square() -> None:
    """Forward: two products over all pairs; causal rows need half. The backward has five where torch's plain one has four."""
    model = tiny_model("llama", dtype=torch.float32)
    model.set_attn_implementation("eager")
    spec = read_spec(model)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(inputs_embeds=torch.randn(1, 40, spec.hidden_size))
    forward = counted.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert 40 * attention_flops(spec, 40) == pytest.approx(3.5 * forward / 2)
    assert 40 * attention_flops(spec, 40, again=True) == pytest.approx(4.5 * forward / 2)


def test_a_window_bounds_attention() -> None:
    spec = read_spec(tiny_model("mistral"))
    assert attention_flops(spec, 8) < attention_flops(spec, 400) == attention_flops(spec, 4000)


# ---- training, by hand


def test_one_rank_computes_and_talks_to_nobody(llama: Architecture) -> None:
    found = planned(llama, 1)
    low, high = found.tokens_per_s["whole"] or (0, 0)
    assert (low, high) == pytest.approx((0.2 * 989e12 / A_TOKEN, 0.45 * 989e12 / A_TOKEN))
    assert found.tokens_per_s["sharded"] == found.tokens_per_s["whole"] and not found.all_reduce_bytes and found.hours is not None


def test_eight_ranks_pay_for_the_ring(llama: Architecture) -> None:
    found = planned(llama, 8, price_per_hour=2.0)
    assert found.all_reduce_bytes == 4 * TRAINABLE and found.forward_tokens == 512
    computing, slowest = 4096 * A_TOKEN / (8 * 989e12 * 0.45), 4096 * A_TOKEN / (8 * 989e12 * 0.2)
    launching = 32 * 220 * 1e-5  # at worst, of a forward and its backward
    assert launching > slowest > computing > 32 * 220 * 4e-6
    ring = 2 * 4 * TRAINABLE * 7 / 8 / (LINK_SHARE * 450e9)
    assert (found.tokens_per_s["whole"] or ())[1] == pytest.approx(4096 / (computing + ring))
    gathering = 2 * 13_476_831_232 * 7 / 8 / (LINK_SHARE * 450e9)
    assert found.gathered_bytes == 2 * 13_476_831_232 * 7 // 8
    assert gathering > computing
    assert found.tokens_per_s["sharded"] == pytest.approx((4096 / (launching + ring + gathering), 4096 / (ring + gathering)))
    assert (found.cost_per_million or {})["whole"][0] == pytest.approx((computing + ring) / 3600 * 8 * 2.0 / 4096 * 1e6)


def test_more_forwards_gather_more(llama: Architecture) -> None:
    short = planned(llama, 2, tokens=8192)
    long = planned(llama, 2, tokens=4 * 8192)
    assert (short.forwards, long.forwards) == (1, 4)


def test_variants_that_end_early_reduce_no_more(llama: Architecture) -> None:
    one = trainee(llama, QV, optimizer="adamw", head=None, trainable=TRAINABLE, tokens_per_step=512, length=512, again=False)
    long = dataclasses.replace(one, steps=10, tokens=5120, flops=10 * one.flops)
    options = {"ranks": 2, "dtype": torch.bfloat16, "max_tokens": 4096, "longest": 512, "shares": (1.0, 1.0)}
    found = plan_ranks(llama, [one, long], dataclasses.replace(H100, kind="cpu"), **options)  # whose kernels nobody launches
    talking = 2 * (11 * 4 * TRAINABLE) * 1 / 2 / (LINK_SHARE * 450e9)
    assert (found.hours or {})["whole"][0] * 3600 == pytest.approx(11 * 512 * A_TOKEN / (2 * 989e12) + talking)
    assert found.steps == 10 and found.forwards == 10


def test_what_fits_is_plans_and_the_base_is_halved(llama: Architecture) -> None:
    found = planned(llama, 2)
    same = plan(llama, QV, batch_tokens=2048, sequence_length=512, device=torch.device("cuda"))
    assert found.forward_tokens == 2048 and found.whole.total == same.train_peak_bytes and found.whole.usable == int(USABLE * 80e9)
    assert found.sharded.base == found.whole.base // 2 and not found.whole.gathered
    layers = 13_476_831_232 - 2 * 32000 * 4096  # with the head
    assert found.sharded.gathered == 2 * (layers // 32)
    assert found.sharded.total - found.whole.total == found.sharded.gathered - found.whole.base // 2


def test_the_largest_micro_batch_is_the_largest(llama: Architecture) -> None:
    fit = planned(llama, 1).whole

    def total(rows: int) -> int:
        return plan(llama, QV, batch_tokens=rows * 512, sequence_length=512, device=torch.device("cuda")).train_peak_bytes

    assert fit.most_rows > 1 and total(fit.most_rows) <= fit.usable < total(fit.most_rows + 1)
    assert fit.most_tokens == 512 * fit.most_rows


def test_what_does_not_fit_whole_may_fit_sharded() -> None:
    big = read_architecture("llama-2-70b")
    found = planned(big, 8, trainable=plan(big, QV).trainable)
    assert not found.whole.fits and found.tokens_per_s["whole"] is None and found.whole.most_rows == 0
    assert found.sharded.fits and found.tokens_per_s["sharded"] is not None


def test_a_fully_fine_tuned_variant_has_a_model_of_its_own(llama: Architecture) -> None:
    n = llama.parameters
    found = planned(llama, 4, FullConfig(), trainable=n)
    assert found.whole.base == 2 * 2 * n and found.whole.optimizer == 12 * n
    assert not found.shardable and found.tokens_per_s["sharded"] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": 0}, "--ranks 0"),
        ({"ranks": 1, "price_per_hour": -1.0}, "--price-per-hour -1"),
        ({"ranks": 1, "shares": (1.5, 1.5)}, "--share-of-peak 1.5"),
        ({"ranks": 1, "dtype": torch.float32}, "dtype float32"),
    ],
)
def test_what_cannot_be_planned(llama: Architecture, changes: dict, words: str) -> None:
    one = trainee(llama, QV, optimizer="adamw", head=None, trainable=1, tokens_per_step=512, length=512, again=False)
    with pytest.raises(ConfigError) as refused:
        plan_ranks(llama, [one], H100, **{"dtype": torch.bfloat16, "max_tokens": 4096, "longest": 512, **changes})
    assert words in str(refused.value.problems)


# ---- serving, by hand


def test_a_replica_by_hand(llama: Architecture) -> None:
    """An fp16 base that is served in fp16: nothing is converted."""
    adapter = plan(llama, QV, dtype="float16")
    found = plan_replica(llama, adapter, H100, replicas=3, dtype=torch.float16, length=512, price_per_hour=3.6)
    base, kv, each = 13_476_831_232, 2 * 32 * 4096 * 2, 2 * TRAINABLE
    free = 72_000_000_000 - base
    assert (found.base_bytes, found.adapter_bytes, found.resident) == (base, each, int(0.1 * free) // each)
    assert (found.kv_tokens, found.streams) == (int(0.3 * free) // kv, 64)
    moved = base - 2 * 32000 * 4096 + each + kv * 256
    assert moved / (0.8 * 3350e9) < 32 * 80 * 4e-6, "one stream waits for the host"
    assert found.decoding[0].tokens_per_s == pytest.approx((1 / (32 * 80 * 1e-5), 1 / (32 * 80 * 4e-6)))
    assert found.decoding[0].cost_per_million == pytest.approx((1e-3 * 1e6 * 32 * 80 * 4e-6, 1e-3 * 1e6 * 32 * 80 * 1e-5))
    slow = plan_replica(llama, adapter, dataclasses.replace(H100, read_bytes=300e9), replicas=1, dtype=torch.float16, length=512)
    assert slow.decoding[0].tokens_per_s == pytest.approx(tuple(s * 300e9 / moved for s in READ_SHARES))
    scores = 32 * 32 * 256 * 512
    assert found.prompt_tokens_per_s[1] == pytest.approx(0.45 * 989e12 / (2 * (llama.parameters - 2 * 32000 * 4096) + scores))


def test_a_decode_step_of_many_streams_computes_longer_than_it_reads() -> None:
    base = read_architecture("llama-3.2-1b")
    found = plan_replica(base, plan(base, QV), BY_NAME["l4-24gb"], replicas=1, dtype=torch.bfloat16, length=128, shares=(0.02, 0.02))
    last = found.decoding[-1]
    assert last.streams == 64 and last.tokens_per_s == pytest.approx((0.02 * 121e12 / (2 * base.parameters),) * 2)


def test_a_base_that_does_not_fit_serves_nothing() -> None:
    big = read_architecture("llama-2-70b")
    found = plan_replica(big, plan(big, QV), H100, replicas=1, dtype=torch.bfloat16, length=512)
    assert not found.fits and found.decoding == () and found.resident == 0


# ---- the command


def test_what_does_not_fit_says_what_would() -> None:
    found = json.loads(invoke("llama-2-7b", "--method", "lora", "--device", "a10-24gb", "--batch-tokens", "16384", "--json").output)
    assert not found["training"]["whole"]["fits"]
    changes = found["training"]["would_fit"]
    assert {c.split()[0] for c in changes} >= {"--batch-tokens", "--device", "--ranks"}, changes
    for change in (c for c in changes if c.startswith(("--activation", "--quantize", "--batch-tokens"))):
        options = ["llama-2-7b", "--method", "lora", "--device", "a10-24gb", "--batch-tokens", "16384", "--json", *change.split()]
        assert json.loads(invoke(*options).output)["training"]["whole"]["fits"], change
    assert "would fit with one of: --quantize nf4" in invoke("llama-2-70b", "--method", "lora", "--device", "h100-80gb").output
    assert "would_fit" not in json.dumps(json.loads(invoke("gpt2", "--device", "h100-80gb", "--json").output)["training"]["whole"])


def test_a_cap_of_keys_and_values_is_named() -> None:
    text = invoke("smollm2-135m-instruct", "--device", "h100-80gb").output
    assert "30% for keys and values (here less: 524,288 tokens are the most" in " ".join(text.split())
    assert "here less" not in invoke("llama-2-7b", "--device", "a10-24gb").output


def test_a_packed_base_is_not_said_to_be_in_bfloat16() -> None:
    text = invoke("llama-2-7b", "--device", "a10-24gb", "--quantize", "nf4").output
    assert text.startswith("llama-2-7b, its linear layers in 4.5 bits, the rest in bfloat16, lora")


def invoke(*args: str):
    return CliRunner().invoke(command, list(args), catch_exceptions=False)


def test_the_table_of_devices_names_its_sources() -> None:
    text = invoke("--devices").output
    assert all(d.name in text and d.source in text for d in DEVICES)
    assert len(json.loads(invoke("--devices", "--json").output)) == len(DEVICES)


def test_no_figure_without_its_assumptions() -> None:
    text = invoke("llama-3.1-8b", "--device", "h100-80gb", "--ranks", "8", "--price-per-hour", "3").output
    for words in (
        "source: NVIDIA H100",
        "20% to 45% of 989",
        "90% of the memory",
        "70% of 450 GB/s",
        "50% to 80% of 3,350",
        "cost of 10⁶ tokens",
    ):
        assert words in text
    given = invoke("llama-3.1-8b", "--device", "h100-80gb", "--share-of-peak", "0.3").output
    assert "30% of 989 TFLOP/s (as given)" in given and "all-reduce" not in given


def test_a_run_file_says_how_long_it_takes(tmp_path: Path, tiny_llama_folder: Path) -> None:
    variants = {"v": METHODS["lora"] | {"data": "a", "batch_size": 4, "epochs": 3}}
    content = run_file(tmp_path, variants, base=str(tiny_llama_folder))
    content["data"] = {"a": content["data"]["a"]}
    del content["defaults"]["max_steps"]
    rows = [{"prompt": "x" * (20 + i), "completion": "y" * 20} for i in range(16)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps(content))
    found = json.loads(invoke(str(run), "--device", "l4-24gb", "--ranks", "2", "--price-per-hour", "0.5", "--json").output)
    training = found["training"]
    assert training["steps"] == 12 and training["tokens"] >= 3 * sum(len(r["prompt"]) + 20 for r in rows)
    low, high = training["tokens_per_s"]["whole"]
    assert training["hours"]["whole"] == pytest.approx([training["tokens"] / high / 3600, training["tokens"] / low / 3600])
    assert training["cost"]["whole"] == pytest.approx([0.5 * 2 * h for h in training["hours"]["whole"]])
    assert found["device"]["name"] == "l4-24gb" and training["assumes"] and found["serving"]["assumes"]
    assert math.isclose(training["whole"]["base"], 2 * read_architecture(str(tiny_llama_folder)).parameters)


def test_a_run_file_with_mistakes_names_them(tmp_path: Path, tiny_llama_folder: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps(run_file(tmp_path, {"v": METHODS["lora"] | {"data": "c"}}, base=str(tiny_llama_folder))))
    with pytest.raises(ConfigError, match="cannot be run"):
        invoke(str(run), "--device", "l4-24gb")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["llama-2-7b", "--ranks", "2"], "none is named"),
        (["llama-2-7b", "--device", "h100", "--ranks", "2"], "did you mean"),
        (["llama-2-7b", "--device", "h100-80gb", "--ranks", "0"], "--ranks 0"),
        ([], "no base is named"),
    ],
)
def test_options_that_make_no_plan(args: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        invoke(*args)
