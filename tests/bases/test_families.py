"""Families that no list knows: each is found, proves itself, and equals transformers and peft.

A few run in the fast suite, those in which families differ most; all of them in the slow one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from tests import tiny
from tests.laws.common import EXAMPLES, cached_logits, difference, noisy, one_thread, tokens
from tests.laws.plain import plain_logits
from tests.tiny import FAMILIES, MORE_FAMILIES, VOCAB, tiny_model, tiny_tokenizer
from trimtab.decode.generate import Sampling
from trimtab.errors import BaseError, ConfigError
from trimtab.forward.proof import prove
from trimtab.methods import BottleneckConfig, LoraConfig, Method, PrefixTuningConfig, PromptTuningConfig
from trimtab.model import Base
from trimtab.store import Adapter

__all__ = ["one_thread"]
FAST = ("gpt_oss", "qwen3_moe", "falcon", "gptj", "cohere2", "granite", "nemotron", "phi3-longrope", "deepseek_v3", "gemma4_text", "opt")
EACH = [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in MORE_FAMILIES]
UNLIKE = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "minicpm3",
    "youtu",
    "mimo_v2_flash",
    "gemma4_text",
    "gemma4_text-moe",
    "gemma4_text-layers",
    "gemma3n_text",
)
"""Families whose layers keep keys and values of different shapes, or share them, which a stored prefix cannot have."""
WITHOUT_MLP = ("opt", "biogpt", "granitemoeshared", "gemma4_text-moe", "gemma3n_text")
"""Families whose layers have no module for their MLP, or two."""
WITHOUT_PROMPT = ("gemma4_text-layers", "gemma3n_text", "mimo_v2_flash", "gemma4_text", "gemma4_text-moe")
"""Families whose layers have embeddings of tokens of their own, or keep keys and values of different shapes from layer to layer."""
ALSO_FAST = ("lora-0", "lora-1", "ia3-0", "bottleneck-0", "prompt-0", "prefix-0")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def plain(family: str) -> Any:
    model = tiny_model(family)
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    return model.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("family", EACH)
def test_its_forward_its_cache_and_its_answers_are_those_of_transformers(family: str) -> None:
    base, model = Base(tiny_model(family), tiny_tokenizer()), plain(family)
    sequences = [tokens(n, n) for n in (1, 7, 40, 140)]
    wanted = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences]
    chunks = [[1], [3, 4], [20, 1, 19], [130, 1, 9]]
    for found in (base.logits(sequences), cached_logits(base, sequences, [None] * 4, chunks)):
        assert max(difference(got, want) for got, want in zip(found, wanted, strict=True)) <= 1e-5
    for ids in sequences[:3]:
        whole = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=9, do_sample=False)[0].tolist()
        assert base.generate_ids([ids], sampling=Sampling(max_new_tokens=9)) == [[t for t in whole[len(ids) :] if t not in base.stop_ids]]


@pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(f, c, marks=() if f in FAST[:4] and c in ALSO_FAST else pytest.mark.slow, id=f"{f}-{c}")
        for f in MORE_FAMILIES
        for c in EXAMPLES
        if not getattr(EXAMPLES[c], "rank_pattern", None)  # whose names not all families have
        and (f, c.partition("-")[0]) != ("falcon", "prefix")  # whose own cache repeats keys for each query head
        and not (f in UNLIKE and c.startswith("prefix"))
        and not (f in WITHOUT_PROMPT and c.startswith("prompt"))
        and not (f in WITHOUT_MLP and c.startswith("bottleneck"))
    ],
)
def test_each_method_computes_what_hooks_on_transformers_own_model_compute(family: str, case: str) -> None:
    base, ids, others = Base(tiny_model(family), tiny_tokenizer()), tokens(21, 2), tokens(9, 3)
    adapter = noisy(base, EXAMPLES[case])
    mixed = base.logits([others, ids, ids], [None, None, adapter])
    model = plain(family)
    assert difference(mixed[2], plain_logits(model, adapter, ids).detach()) < 2e-5
    assert difference(mixed[0], plain_logits(model, None, others).detach()) < 2e-5
    assert difference(mixed[1], mixed[2]) > 0.01


@pytest.mark.parametrize("family", EACH)
def test_lora_is_pefts_in_logits_and_gradients_both_ways(family: str, tmp_path: Path) -> None:
    ids, generator = tokens(20, 7), torch.Generator().manual_seed(4)
    spec = Base(tiny_model(family), tiny_tokenizer()).spec
    experts = any(m.kind == "experts" for m in spec.modules.values())  # peft takes the names of an MLP for those of experts
    linears = [n for n in spec.linears if not n.rpartition(".")[2].isdigit()]  # peft would take a number for that of a layer
    names = sorted({n.rpartition(".")[2] for n in linears if not experts or ("attn" in n and "gate" not in n)})
    torch.manual_seed(1)  # of peft's start: with some, peft's own fp32 is 1e-4 from its fp64 on gemma4_text-layers
    theirs = peft.get_peft_model(plain(family), peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=names)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "theirs")
    base = Base(tiny_model(family), tiny_tokenizer(), name="tiny")
    adapter = Adapter.load(tmp_path / "theirs", base)
    adapter.params = {k: p.requires_grad_() for k, p in adapter.params.items()}
    wanted, got = theirs(torch.tensor([ids]), use_cache=False).logits[0], base.logits([ids], [adapter], grad=True)[0]
    assert difference(got.detach(), wanted.detach()) < 2e-5
    for logits in (wanted, got):
        cross_entropy(logits[:-1], torch.tensor(ids[1:])).backward()
    slopes = {n.removeprefix("base_model.model.").replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert set(slopes) == set(adapter.params)
    assert max(difference(adapter.params[n].grad, slope) for n, slope in slopes.items()) < 1e-5
    Adapter(base, adapter.method, {k: p.detach() for k, p in adapter.params.items()}).save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(plain(family), tmp_path / "ours").eval()
    assert difference(again(torch.tensor([ids]), use_cache=False).logits[0].detach(), wanted.detach()) < 2e-5


@pytest.mark.parametrize(
    ("family", "case", "why"),
    [
        ("mimo_v2_flash", "prompt-0", "different shapes"),
        ("gemma4_text", "prompt-0", "different shapes"),
        ("gemma4_text", "prefix-0", "different shapes"),
        ("gemma3n_text", "prefix-0", "attend to keys and values of another"),
        ("gemma3n_text", "prompt-0", "embeddings of the tokens of its own"),
        ("gemma3n_text", "bottleneck-0", "no module of its own for its MLP"),
    ],
)
def test_a_method_that_a_family_has_no_place_for_is_refused_by_name(family: str, case: str, why: str) -> None:
    base = Base(tiny_model(family), tiny_tokenizer())
    with pytest.raises(ConfigError, match=why):
        Adapter.create(base, EXAMPLES[case])


@pytest.mark.slow
def test_default_targets_are_pefts() -> None:
    """Where peft's tables have a family. It takes the MLP of Phi as well, and queries in place of keys for IA³ in some families.
    In OPT it takes them in place of values."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA

    seen = 0
    for family in [*FAMILIES, *MORE_FAMILIES]:
        model = tiny_model(family)
        defaults = prove(model).defaults
        if family in LORA and family != "phi":
            assert list(defaults.lora_targets) == LORA[family], family
            seen += 1
        if family in IA3 and family not in ("mixtral", "opt"):
            assert [n.replace("k_proj", "q_proj") for n in defaults.ia3_targets] == [n.replace("k_proj", "q_proj") for n in IA3[family]], (
                family
            )
    assert seen >= 14


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("deepseek_v3", PrefixTuningConfig(prefix_init="ZERO"), "keep keys and values of different shapes"),
        ("gemma4_text", PrefixTuningConfig(prefix_init="ZERO"), "keep keys and values of different shapes"),
        ("gemma4_text-layers", PromptTuningConfig(), "has embeddings of the tokens of its own, which virtual tokens do not have"),
        ("opt", BottleneckConfig(), r"model\.decoder\.layers\.0 of this opt base has no module of its own for its MLP, or several"),
    ],
)
def test_what_a_family_has_no_place_for_is_refused(family: str, method: Method, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Adapter.create(Base(tiny_model(family), tiny_tokenizer()), method)


def test_a_router_is_no_linear_layer() -> None:
    """Though its class is one in this family: peft adds LoRA's part to the first of its three results, and fails."""
    base = Base(tiny_model("phimoe"), tiny_tokenizer())
    assert not any("router" in name for name in base.spec.linears)
    with pytest.raises(ConfigError, match=r"router is a router of experts, no linear layer: name mlp\.router\.weight"):
        Adapter.create(base, LoraConfig(target_modules=["router"]))
    theirs = peft.get_peft_model(plain("phimoe"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["router"]))
    with pytest.raises(AttributeError, match="'tuple' object"):
        theirs(torch.tensor([tokens(4, 1)]))


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("qwen3_next", {}, r"layers of type 'linear_attention': only full_attention and sliding_attention are supported"),
        ("llama4_text", {}, r"layers of type 'chunked_attention'"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, r"layers of type 'conv'"),
        ("mamba", {}, r"layers of type 'linear_attention'"),
        ("bloom", {}, r"attention modules in transformer\.h\.0, of which there should be one: none"),
        ("falcon", {"alibi": True}, r"alibi is set: attention with linear biases is not supported"),
        ("opt", {"word_embed_proj_dim": 32}, r"its embedding or head has 32 features, where hidden states have 48"),
    ],
)
def test_what_keeps_another_state_is_refused_by_name(family: str, settings: dict[str, Any], words: str) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(family, **sizes, **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(BaseError, match=words):
        prove(model.to_empty(device="cpu").eval())


def test_rotary_embeddings_that_change_with_the_length_are_used_up_to_there() -> None:
    model = tiny_model("phi3-longrope")
    assert model.config.max_position_embeddings == 512 and Base(model, tiny_tokenizer()).spec.max_positions == 256


def test_the_table_and_the_example_of_the_docs_are_what_is_tested() -> None:
    root = Path(__file__).parent.parent.parent
    table = (root / "docs/families.md").read_text(encoding="utf-8").split("## Refused")[0]
    listed = set(re.findall(r"^\|[^|]+\| `(\w+)` \| yes ", table, re.MULTILINE))
    assert listed == {tiny_model(f).config.model_type for f in [*FAMILIES, *MORE_FAMILIES]}
    section = (root / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a model family\n")[1].split("\n## ")[0]
    (model,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert eval(f"{{{model}}}", vars(tiny)) == {"olmo2": MORE_FAMILIES["olmo2"]}
