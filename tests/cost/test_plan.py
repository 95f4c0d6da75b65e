"""The plan agrees with published sizes, a real attach (to the parameter), real files (to the byte) and what a real forward keeps."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save

from tests.tiny import FAMILIES, tiny_folder, tiny_model
from trimtab.bases import BUNDLED_NAMES
from trimtab.bases.bundled import bundled_folder, find_gguf
from trimtab.bases.shapes import PRESETS, Architecture, read_architecture
from trimtab.bases.structure import read_spec
from trimtab.cli.plan import plan as command
from trimtab.cost.activations import FUSED, comparison_bytes, kept_bytes
from trimtab.cost.plan import CostPlan, file_bytes, plan, rows
from trimtab.cost.room import Pass, memory_bytes
from trimtab.cost.serving import memory_of_server
from trimtab.errors import BaseError, ConfigError
from trimtab.methods import (
    BY_NAME,
    METHODS,
    BottleneckConfig,
    FullConfig,
    Head,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from trimtab.methods.base import Site
from trimtab.model import Base
from trimtab.ops import native
from trimtab.store import Adapter
from trimtab.train.options import TrainOptions, VariantConfig

QV = LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
LINEAR = LoraConfig(r=16, target_modules="all-linear")
EXAMPLES = [e for cls in METHODS.values() for e in cls.examples()]
MORE = [
    LoraConfig(r=4, lora_dropout=0.1),
    LoraConfig(r=2, modules_to_save=["lm_head"]),
    LoraConfig(r=2, target_modules=None, rank_pattern={"v_proj|c_attn|qkv_proj": 5}, use_rslora=True),
    LoraConfig(r=1),
    PromptTuningConfig(num_virtual_tokens=7, prompt_tuning_init="RANDOM"),
    BottleneckConfig(layers_to_transform=1),
]


def name_of(method):
    return f"{method.name}-{'-'.join(str(v) for v in method.to_dict().values() if v)}"[:60]


def tiny(family: str, dtype: torch.dtype = torch.float32) -> tuple[Architecture, Base]:
    model = tiny_model(family, dtype=dtype).requires_grad_(False)
    spec = read_spec(model)
    return Architecture(family, spec, spec.num_parameters, dtype), Base(model, None)


# ---- published sizes


@pytest.mark.parametrize(
    ("base", "method", "trainable"),
    [
        ("llama-2-7b", QV, 8_388_608),
        ("llama-2-13b", QV, 13_107_200),
        ("llama-2-70b", QV, 32_768_000),
        ("llama-2-7b", LINEAR, 39_976_960),
        ("llama-2-7b", IA3Config(), 614_400),
        ("llama-2-7b", PrefixTuningConfig(num_virtual_tokens=30), 30 * 2 * 32 * 4096),
        ("llama-2-7b", PromptTuningConfig(num_virtual_tokens=20), 20 * 4096),
        ("llama-2-7b", FullConfig(), 6_738_415_616),
        ("smollm2-135m-instruct", LINEAR, 4_884_480),
    ],
    ids=lambda value: name_of(value) if dataclasses.is_dataclass(value) else str(value),
)
def test_known_trainable_parameters(base, method, trainable):
    assert plan(read_architecture(base), method).trainable == trainable


def test_known_file_and_base_sizes():
    architecture = read_architecture("llama-2-7b")
    narrow, wide = plan(architecture, QV, dtype="auto"), plan(architecture, LINEAR)
    assert (narrow.dtype, narrow.base_bytes) == ("float16", 13_476_831_232)
    assert narrow.adapter_file_bytes / 1e6 == pytest.approx(33.6, abs=0.05)
    assert wide.adapter_file_bytes / 1e6 == pytest.approx(160, abs=0.5)
    assert narrow.percent == pytest.approx(0.1245, abs=1e-4)


# The totals that the models' own cards and safetensors headers give.
PUBLISHED = {
    "smollm2-135m-instruct": 134_515_008,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
    "gemma-2-2b": 2_614_341_888,
    "gpt2": 124_439_808,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_published_size_and_every_method_fits_them(name):
    architecture = read_architecture(name)
    assert architecture.parameters == PUBLISHED[name]
    for cls in BY_NAME.values():
        assert plan(architecture, cls()).trainable > 0


def test_bundled_base_is_a_preset_and_is_what_is_bundled():
    assert set(BUNDLED_NAMES) <= set(PRESETS)
    if (bundled_folder() / "config.json").is_file():
        config = json.loads((bundled_folder() / "config.json").read_text())
        assert {k: config[k] for k in PRESETS["smollm2-135m-instruct"][1]} == PRESETS["smollm2-135m-instruct"][1]


# ---- agreement with the real thing


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_a_real_attach(family):
    architecture, base = tiny(family)
    for method in [*EXAMPLES, *MORE]:
        adapter, planned = Adapter.create(base, method), plan(architecture, method)
        assert planned.trainable == adapter.num_parameters, method
        _, saved = method.export(adapter.params)
        prefix = "" if method.name in ("prompt", "prefix") else "base_model.model."
        for dtype, size in ((torch.float32, planned.adapter_file_bytes), (torch.bfloat16, planned.adapter_file_bytes_bf16)):
            written = save({prefix + k: v.to(dtype).contiguous() for k, v in saved.items()}, metadata={"format": "pt"})
            assert size == len(written), method


@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_all_parameters_with_tied_ones_once(family):
    architecture, base = tiny(family)
    planned = plan(architecture, FullConfig(), dtype="float32")
    assert planned.trainable == architecture.parameters == sum(p.numel() for p in base.model.parameters())
    tensors = {name: p.data for name, p in base.model.named_parameters()}
    assert planned.adapter_file_bytes == len(save(tensors, metadata={"format": "pt"}))
    assert planned.optimizer_bytes == 8 * planned.trainable  # fp32 weights are their own master copy
    assert planned.full is None


def test_reparametrised_prefix_counts_its_mlp_and_saves_its_output():
    architecture = read_architecture("gpt2")
    plain = plan(architecture, PrefixTuningConfig(num_virtual_tokens=10))
    through = plan(architecture, PrefixTuningConfig(num_virtual_tokens=10, prefix_projection=True, encoder_hidden_size=64))
    flat, width = 2 * 12 * 768, 768
    assert plain.trainable == 10 * flat
    assert through.trainable == 10 * width + (64 * width + 64) + (flat * 64 + flat)
    assert through.adapter_file_bytes == plain.adapter_file_bytes == file_bytes({"prompt_embeddings": (10, flat)}, torch.float32)


def saved_for_backward(base: Base, adapter: Adapter | None, sequences: int, length: int) -> int:
    """Bytes that autograd keeps of one forward of the layers, parameters and logits left out."""
    params = list(base.model.parameters()) + list(base.model.buffers()) + (list(adapter.params.values()) if adapter else [])
    for p in adapter.params.values() if adapter else ():
        p.requires_grad_(True)
    own, kept = {p.untyped_storage().data_ptr() for p in params}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and base.spec.vocab_size not in tensor.shape:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor is held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = base.logits([list(range(length))] * sequences, [adapter] * sequences, grad=True)
    del logits
    return sum(nbytes for nbytes, _ in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_a_forward_keeps(family):
    """kept_bytes is a formula: where the forward comes to keep less (or more), it wants changing."""
    sequences, length = 4, 64
    _, base = tiny(family, torch.bfloat16)
    for method in [e for e in [*EXAMPLES, *MORE] if not getattr(e, "modules_to_save", None)]:
        sites, virtual = method.sites(base.spec), getattr(method, "num_virtual_tokens", 0)
        extra = virtual if method.name == "prompt" else 0
        estimate = kept_bytes(base.spec, sites, torch.bfloat16, sequences * length + extra, length, virtual=virtual)
        measured = saved_for_backward(base, Adapter.create(base, method), sequences, length)
        # A bottleneck starts behind the first layer's attention, which kept_bytes counts whole: half of all where there are two layers.
        most = 1.12 if method.name != "bottleneck" else 1.12 * base.spec.num_layers / (base.spec.num_layers - 1)
        assert 0.88 <= estimate / measured <= most, (method, estimate, measured)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_taken_as_fused_are_those_that_the_forward_fuses(family):
    architecture, base = tiny(family)
    fused = {kind for kind in ("RMSNorm", "MLP") if any(name.endswith(kind) for name in base.attached.fast)}
    assert fused == ({"RMSNorm", "MLP"} if architecture.spec.model_type in FUSED else set())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_activations_of_full_fine_tuning(family):
    _, base = tiny(family, torch.bfloat16)
    base.model.requires_grad_(True)
    sites = [Site(m.name, m.parameters, saved=True) for m in base.spec.modules.values()]
    estimate = kept_bytes(base.spec, sites, torch.bfloat16, 512, 128)
    assert estimate / saved_for_backward(base, None, 4, 128) == pytest.approx(1.0, abs=0.12)


# ---- arithmetic


def test_training_terms_add_up_and_scale_with_variants():
    architecture = read_architecture("llama-3.2-1b")
    one, four = plan(architecture, QV), plan(architecture, QV, variants=4)
    P, N = one.trainable, architecture.parameters
    assert (one.weight_bytes, one.gradient_bytes, one.optimizer_bytes) == (6 * P, 4 * P, 8 * P)
    assert (four.weight_bytes, four.gradient_bytes, four.optimizer_bytes) == (24 * P, 16 * P, 32 * P)
    for p in (one, four):
        terms = (p.base_bytes, p.weight_bytes, p.gradient_bytes, p.optimizer_bytes, p.activation_bytes)
        assert p.train_peak_bytes == sum(terms) and p.base_bytes == 2 * N
        assert all(isinstance(v, int) for k, v in p.to_dict().items() if k.endswith("_bytes"))
    assert (four.trainable, four.adapter_file_bytes, four.activation_bytes) == (one.trainable, one.adapter_file_bytes, one.activation_bytes)
    assert four.serve_peak_bytes - one.serve_peak_bytes == 3 * 2 * P
    assert one.full is not None and (one.full.gradient_bytes, one.full.optimizer_bytes) == (2 * N, 12 * N)
    assert one.full.train_peak_bytes > 2 * one.train_peak_bytes


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which inference copies weights."""
    monkeypatch.setattr(native, "copies_weights", lambda: True)


@pytest.mark.usefixtures("copies")
def test_a_base_is_served_from_packed_weights_beside_what_was_converted(monkeypatch):
    architecture = dataclasses.replace(read_architecture("llama-3.2-1b"), dtype=torch.bfloat16)
    model = 16 * (2048 * (2 * 2048 + 2 * 512) + 3 * 2048 * 8192) + 128_256 * 2048  # projections of the layers, and the head
    mapped, converted = (plan(dataclasses.replace(architecture, dtype=d), QV) for d in (torch.bfloat16, torch.float32))
    looked_at = 2 * 2**20 * (16 * 7 + 1)  # of each of these matrices, of which all have as much
    assert converted.serve_peak_bytes - mapped.serve_peak_bytes == 2 * model - looked_at
    assert mapped.serve_peak_bytes > mapped.base_bytes + looked_at + mapped.serve_kv_bytes
    assert plan(architecture, QV, dtype="float32").serve_peak_bytes < 2 * mapped.serve_peak_bytes, "only bf16 is packed"
    monkeypatch.setattr(native, "copies_weights", lambda: False)
    read = [plan(dataclasses.replace(architecture, dtype=d), QV) for d in (torch.bfloat16, torch.float32)]
    assert {p.serve_peak_bytes for p in read} == {mapped.serve_peak_bytes - looked_at}, "read as they are"


@pytest.mark.usefixtures("copies")
def test_only_a_cpu_packs_weights():
    architecture = dataclasses.replace(read_architecture("llama-3.2-1b"), dtype=torch.bfloat16)
    variant = VariantConfig(name="v", data="d", method=QV, options=TrainOptions(keep_best=False))
    run = SimpleNamespace(activation_checkpointing=False, max_tokens=100)
    passes = [Pass(tokens=10, longest=10, asked=2, answer=10, midway=True)]  # as few as logits are formed at a time on either
    served, trained = {}, {}
    for device in map(torch.device, ("cpu", "cuda")):
        base = SimpleNamespace(path=None, spec=architecture.spec, dtype=torch.bfloat16, device=device)
        served[device.type] = memory_of_server(base, 1, 1, 1).weight_bytes
        trained[device.type] = memory_bytes(run, architecture, [variant], torch.bfloat16, device, 10, 10, passes)[0]
    model = 16 * (2048 * (2 * 2048 + 2 * 512) + 3 * 2048 * 8192) + 128_256 * 2048
    assert served["cuda"] == 2 * architecture.parameters
    assert served["cpu"] - served["cuda"] == trained["cpu"] - trained["cuda"] == 2 * model


def test_full_models_share_no_base_when_served():
    one, four = (plan(read_architecture("gpt2"), FullConfig(), variants=n) for n in (1, 4))
    assert four.serve_peak_bytes - one.serve_peak_bytes == 3 * one.base_bytes
    assert four.train_peak_bytes == one.train_peak_bytes  # one after another


def test_prompts_are_served_as_keys_and_values():
    architecture = read_architecture("llama-2-7b")
    for method in (PromptTuningConfig(num_virtual_tokens=20), PrefixTuningConfig(num_virtual_tokens=20)):
        assert plan(architecture, method, variants=3).serve_adapter_bytes == 3 * 20 * 2 * 32 * 4096 * 2


def test_memory_grows_with_tokens_and_shrinks_with_late_layers():
    architecture = read_architecture("llama-3.2-1b")
    few, many = (plan(architecture, QV, batch_tokens=n).activation_bytes for n in (2048, 4096))
    late = plan(architecture, LoraConfig(r=16, layers_to_transform=[15])).activation_bytes
    assert 1.5 * few < many <= 2 * few
    assert late < many / 3


def test_plain_data():
    p = plan(read_architecture("gpt2"), LoraConfig(r=4, target_modules=None))
    assert json.loads(json.dumps(p.to_dict()))["full"]["method"] == "full"
    assert rows([p, p.full])[1]["percent"] == 100.0
    assert [f.name for f in dataclasses.fields(CostPlan)][:2] == ["base", "method"]


# ---- where architectures come from


def test_no_weights_are_allocated():
    read_architecture("gpt2")  # imports what is imported once
    before = psutil.Process().memory_info().rss
    assert plan(read_architecture("llama-2-70b"), LINEAR).base_bytes > 137e9
    assert psutil.Process().memory_info().rss - before < 200e6


def test_config_is_enough(tmp_path):
    tiny_folder(tmp_path / "whole")
    want = read_spec(tiny_model("llama"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    for source in (tmp_path / "whole", tmp_path / "bare", tmp_path / "bare" / "config.json"):
        architecture = read_architecture(str(source))
        assert architecture.spec == want
        assert architecture.dtype.itemsize == 4


@pytest.mark.slow
def test_gguf_is_read_without_converting():
    file = find_gguf()
    if file is None:
        pytest.skip("the bundled base's weight file is not installed")
    assert read_architecture(str(file)).spec == read_architecture("smollm2-135m-instruct").spec


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama-2-7v", "did you mean 'llama-2-7b'"),
        ("Llama-3.1-8B", "did you mean 'llama-3.1-8b'"),
        ("meta-llama/Llama-2-7b-hf", "no weights are needed"),
        ("./nowhere", "neither a known name"),
    ],
)
def test_unknown_name(name, says):
    with pytest.raises(BaseError, match="there is no architecture") as error:
        read_architecture(name)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bloom"}, "this bloom model is built in a way that trimtab does not know"),
        ({"model_type": "t5"}, "cannot build a causal language model"),
        ({"model_type": "no_such_family"}, "cannot build a causal language model"),
        ({"model_type": "llama", "hidden_size": "wide"}, "cannot build a causal language model"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil"}}, "code that comes with a model is never run"),
        (None, "no config.json"),
    ],
)
def test_unusable_config(tmp_path, config, says):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match=says):
        read_architecture(str(tmp_path))


def test_bad_methods_and_numbers():
    architecture = read_architecture("gpt2")
    with pytest.raises(ConfigError, match="q_proj"):
        plan(architecture, QV)
    with pytest.raises(ConfigError, match="is above its smaller side"):
        plan(architecture, LoraConfig(r=4000))
    with pytest.raises(ConfigError, match=r"dtype 'float23'.*did you mean 'float32'"):
        plan(architecture, IA3Config(), dtype="float23")
    with pytest.raises(ConfigError) as error:
        plan(architecture, IA3Config(), batch_tokens=0, sequence_length=4096, variants=-1)
    assert len(error.value.problems) == 3


# ---- the command


def run(*args: str):
    return CliRunner().invoke(command, list(args))


def test_command_prints_every_method_whole():
    result = run("llama-2-70b")
    assert result.exit_code == 0, result.output
    for text in (*BY_NAME, "207,093,760", "68,976,648,192", "137.95 GB"):
        assert text in result.output


def test_command_prints_one_method_beside_full():
    result = run("llama-2-7b", "--method", "lora", "-o", "r=16", "--set", "target_modules=[q_proj, v_proj]", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert all(text in result.output for text in ("8,388,608", "33.57", "6,738,415,616", "13.48 GB in float16"))
    assert "ia3" not in result.output
    assert "ia3" in run("llama-2-7b", "--method", "lora", "--all").output


def test_command_prints_json():
    result = run("gpt2", "--json", "--variants", "2", "--batch-tokens", "100", "--sequence-length", "10")
    read = json.loads(result.output)
    assert read["base_parameters"] == 124_439_808
    assert [p["method"] for p in read["plans"]] == list(BY_NAME)
    assert all((p["variants"], p["batch_tokens"], p["sequence_length"]) == (2, 100, 10) for p in read["plans"])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--method", "lora", "--set", "rr=4"], "did you mean 'r'"),
        (["--method", "lora", "--set", "r=many"], "r = 'many'"),
        (["--method", "lora", "--set", "quantize=nf4"], "an option of this command: write --quantize nf4"),
        (["--method", "lora", "--set", "r"], "'r' is not FIELD=VALUE"),
        (["--method", "lora", "--set", "r=1", "--set", "r=2"], "r is set twice"),
        (["--method", "lora", "--set", "target_modules=[a"], "is not YAML"),
        (["--set", "r=4"], "add --method"),
    ],
)
def test_command_refuses(args, says):
    error = run("gpt2", *args).exception
    assert isinstance(error, ConfigError)
    assert says in str(error)


def test_heads_are_counted():
    """As adapters of every method have and save them; full fine-tuning has none."""
    architecture, base = tiny("llama")
    head = Head(("a", "b", "c"))
    for cls in BY_NAME.values():
        if cls is FullConfig:
            continue
        method = cls.examples()[0]
        adapter, costs = Adapter.create(base, method, head=head), plan(architecture, method, dtype="float32", head=head)
        bare = plan(architecture, method, dtype="float32")
        assert costs.trainable == adapter.num_parameters == bare.trainable + 3 * base.spec.hidden_size, cls
        assert costs.optimizer_bytes - bare.optimizer_bytes == 8 * 3 * base.spec.hidden_size
    plans = json.loads(run("llama-2-7b", "--method", "lora", "--labels", "5", "--json").output)["plans"]
    assert plans[0]["trainable"] == plan(read_architecture("llama-2-7b"), LoraConfig()).trainable + 5 * 4096
    assert plans[1]["trainable"] == read_architecture("llama-2-7b").parameters


def test_command_help_names_every_method_and_an_example():
    output = run("--help").output
    assert all(name in output for name in BY_NAME)
    assert "trimtab plan llama-2-7b" in output


def test_layers_that_differ_are_counted_each() -> None:
    """Of a model with a layer of either kind, half of what two models keep that have two layers of one kind each."""

    def spec_of(*inner: int):
        model = tiny_model("llama")
        for i, width in enumerate(inner):
            config = copy.deepcopy(model.config)
            config.intermediate_size, config.num_attention_heads, config.head_dim = width, width // 12, 12
            model.model.layers[i] = type(model.model.layers[i])(config, i)
        return read_spec(model)

    narrow, wide, mixed = (kept_bytes(spec_of(*inner), [], torch.float32, 40, 20) for inner in ((48, 48), (96, 96), (48, 96)))
    assert narrow < wide and 2 * mixed == narrow + wide


def test_what_is_packed_is_said_and_that_full_is_dense() -> None:
    def said(*options: str) -> str:
        return CliRunner().invoke(command, ["llama-2-7b", "--quantize", "nf4", *options]).stdout

    heads = [said(*options).splitlines()[0] for options in ((), ("--method", "full", "--all"))]
    assert heads[0] == heads[1] and "4.17 GB, its linear layers in 4.5 bits, the rest in bfloat16" in heads[0]
    assert all("full is of the dense base" in said(*options) for options in ((), ("--method", "lora"), ("--method", "full")))
    assert "13.48 GB in bfloat16\n" in said("--method", "full")
    assert "dense" not in CliRunner().invoke(command, ["llama-2-7b"]).stdout


def test_the_decode_paths_comparison_is_counted_where_it_is_more_than_a_forward() -> None:
    architecture = read_architecture("llama-3.2-1b", "nf4")
    assert comparison_bytes(architecture.spec) == 12 * 2048 * 8192
    found = plan(architecture, QV, batch_tokens=64, sequence_length=64)
    beside = found.serve_peak_bytes - found.base_bytes - found.serve_kv_bytes - found.serve_adapter_bytes
    assert 12 * 2048 * 8192 <= beside < 12 * 2048 * 8192 + 2 * 2**20 * 2
    assert comparison_bytes(read_architecture("gpt2").spec) == 0  # which has no decode path
