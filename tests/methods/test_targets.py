"""Which modules a method acts on: peft's rules for names, and every refusal with its hint."""

import dataclasses
import math

import pytest

from tests.laws.common import base_of
from trimtab.errors import ConfigError
from trimtab.methods import METHODS, BottleneckConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from trimtab.store import Adapter

LLAMA, GPT2 = base_of("llama").spec, base_of("gpt2").spec
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _names(method, spec=LLAMA):
    return [s.name for s in method.sites(spec)]


def _layers(*parts, layers=(0, 1)):
    return [f"model.layers.{i}.{p}" for i in layers for p in parts]


def _refusal(method, spec=LLAMA):
    with pytest.raises(ConfigError) as e:
        method.sites_to_train(spec)
    assert e.value.exit_code == 2
    return e.value


# ---- names that match --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], _layers("self_attn.q_proj", "self_attn.v_proj")),  # a list: the last dotted part
        (["model.layers.1.mlp.up_proj"], _layers("mlp.up_proj", layers=[1])),  # or the whole name
        (["mlp.down_proj"], _layers("mlp.down_proj")),  # or several last parts
        (r".*layers\.0\..*(q|k)_proj", _layers("self_attn.q_proj", "self_attn.k_proj", layers=[0])),  # a string: the whole name as a regex
        ("all-linear", _layers(*ATTENTION, *MLP)),  # all but the head
        (["lm_head"], ["lm_head"]),
        (None, _layers("self_attn.q_proj", "self_attn.v_proj")),  # the family's default
        (["embed_tokens"], ["model.embed_tokens"]),
    ],
)
def test_names(targets, expected):
    assert _names(LoraConfig(r=2, target_modules=targets)) == expected


def test_a_list_entry_is_no_regex_and_no_substring():
    for wanted in ("proj", "_proj", ".*q_proj", "q_pro"):
        assert f"{wanted!r} matches no module" in _refusal(LoraConfig(r=2, target_modules=[wanted])).problems[0]


def test_a_string_must_match_the_whole_name():
    assert "whole name" in _refusal(LoraConfig(r=2, target_modules="q_proj")).problems[0]
    assert "whole name (did you mean 'q_proj'?)" in _refusal(LoraConfig(r=2, target_modules="q_prj")).problems[0]
    assert _names(LoraConfig(r=2, target_modules=r".*\.q_proj")) == _layers("self_attn.q_proj")


def test_a_string_that_is_no_regular_expression():
    assert (
        _refusal(LoraConfig(r=2, target_modules="(q_proj")).problems[0].startswith("target_modules = '(q_proj' is not a regular expression")
    )
    assert "is not a regular expression" in _refusal(LoraConfig(r=2, exclude_modules="(q_proj")).problems[0]
    assert "is not a regular expression" in _refusal(IA3Config(feedforward_modules="(down_proj")).problems[0]


def test_gpt2_names():
    assert _names(LoraConfig(r=2, target_modules=None), GPT2) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    both = _names(LoraConfig(r=2, target_modules=["c_proj"]), GPT2)
    assert both == [f"transformer.h.{i}.{p}.c_proj" for i in (0, 1) for p in ("attn", "mlp")]
    assert _names(LoraConfig(r=2, target_modules=["mlp.c_proj"]), GPT2) == [n for n in both if ".mlp." in n]
    assert len(_names(LoraConfig(r=2), GPT2)) == 8


def test_excludes():
    assert _names(LoraConfig(r=2, exclude_modules=["q_proj", "mlp.up_proj"])) == [
        n for n in _layers(*ATTENTION, *MLP) if not n.endswith(("q_proj", "up_proj"))
    ]
    assert _names(LoraConfig(r=2, exclude_modules=r".*\.mlp\..*")) == _layers(*ATTENTION)
    assert _names(IA3Config(exclude_modules=["down_proj"])) == _layers("self_attn.k_proj", "self_attn.v_proj")


def test_layers_to_transform():
    assert _names(LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=1)) == _layers("self_attn.q_proj", layers=[1])
    assert _names(LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 1])) == _layers("self_attn.q_proj")
    assert _names(BottleneckConfig(layers_to_transform=[1])) == _layers("self_attn.o_proj", "mlp", layers=[1])
    assert _names(BottleneckConfig(layers_to_transform=0, variant="pfeiffer")) == _layers("mlp", layers=[0])


def test_ia3_feed_forward_modules():
    kinds = {s.name.rpartition(".")[2]: (s.feedforward, s.shapes["ia3_l"]) for s in IA3Config().sites(LLAMA)}
    assert kinds == {"k_proj": (False, (24, 1)), "v_proj": (False, (24, 1)), "down_proj": (True, (1, 96))}
    chosen = IA3Config(target_modules="all-linear", feedforward_modules=r".*\.mlp\.(up|down)_proj").sites(LLAMA)
    assert [s.name for s in chosen if s.feedforward] == _layers("mlp.up_proj", "mlp.down_proj")
    assert not any(s.feedforward for s in IA3Config(feedforward_modules=[]).sites(LLAMA))


def test_modules_to_save():
    method = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    saved = {s.name: dict(s.shapes) for s in method.sites(LLAMA) if s.saved}
    assert saved == {"model.norm": {"weight": (48,)}, "lm_head": {"weight": (300, 48)}}


# ---- rank_pattern and alpha_pattern ------------------------------------------------------------------------------------------------------


def test_patterns_set_rank_and_alpha_module_by_module():
    method = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "up_proj"],
        rank_pattern={"q_proj": 2, r"layers\.1\..*_proj": 6, "k_proj": 3},
        alpha_pattern={"up_proj": 12},
    )
    got = {s.name.removeprefix("model.layers."): (s.rank, s.scaling, s.shapes["lora_A.weight"][0]) for s in method.sites(LLAMA)}
    assert got == {
        "0.self_attn.q_proj": (2, 8 / 2, 2),
        "0.self_attn.k_proj": (3, 8 / 3, 3),
        "0.mlp.up_proj": (4, 12 / 4, 4),
        "1.self_attn.q_proj": (2, 8 / 2, 2),  # the first key that matches counts
        "1.self_attn.k_proj": (6, 8 / 6, 6),
        "1.mlp.up_proj": (6, 12 / 6, 6),
    }


def test_patterns_and_rslora_and_the_default_alpha():
    method = LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 9}, use_rslora=True)
    assert method.sites(LLAMA)[0].scaling == 8 / math.sqrt(9)  # alpha is 2r of the config, not of the pattern


def test_keys_of_patterns_that_match_no_targeted_module_are_refused_with_their_nearest():
    """peft ignores them in silence, and trains another rank than was asked for."""
    error = _refusal(
        LoraConfig(
            r=30,
            target_modules=["q_proj", "k_proj"],
            rank_pattern={"q_prj": 2, r"layers\.7\..*": 4, "up_proj": 8, "k_proj": 3, "model.layers.1.self_attn.k_prj": 2},
            alpha_pattern={"proj": 99, "q_proj": 4},
        )
    )
    assert error.problems == (
        "rank_pattern: 'q_prj' matches no targeted module (did you mean 'q_proj'?)",
        r"rank_pattern: 'layers\\.7\\..*' matches no targeted module",
        "rank_pattern: 'up_proj' matches no targeted module, only others such as model.layers.0.mlp.up_proj",
        "rank_pattern: 'model.layers.1.self_attn.k_prj' matches no targeted module (did you mean 'k_proj'?)",
        "alpha_pattern: 'proj' matches no targeted module (did you mean 'q_proj'?)",  # no dotted part
    )
    assert "targeted are: q_proj, k_proj" in error.fix


def test_stray_keys_come_with_other_findings():
    error = _refusal(LoraConfig(r=30, target_modules=["k_proj"], rank_pattern={"v_proj": 2}))
    assert "rank_pattern: 'v_proj'" in error.problems[0] and "rank 30 is above its smaller side 24" in error.problems[1]
    assert "targeted are: k_proj" in error.fix and "lower r" in error.fix
    assert _refusal(LoraConfig(r=2, layers_to_transform=[1], alpha_pattern={r".*layers\.0\.mlp.*": 3})).problems
    both = _refusal(LoraConfig(r=2, target_modules=["k_proj", "v_prj"], rank_pattern={"v_prj": 3}))
    assert [p.partition(":")[0] for p in both.problems] == ["target_modules", "rank_pattern"]


# ---- refusals against a base -------------------------------------------------------------------------------------------------------------


def test_one_bad_name_among_good_ones_is_refused_with_its_nearest():
    error = _refusal(LoraConfig(r=2, target_modules=["q_proj", "v_prj", "zzz"]))
    assert error.problems == (
        "target_modules: 'v_prj' matches no module (did you mean 'v_proj'?)",
        "target_modules: 'zzz' matches no module",
    )
    assert "q_proj" in error.fix and "down_proj" in error.fix


def test_a_bad_name_in_every_other_list():
    assert "exclude_modules: 'k_prj'" in _refusal(LoraConfig(r=2, exclude_modules=["k_prj"])).problems[0]
    assert (
        "modules_to_save: 'lm_heda' matches no module (did you mean 'lm_head'?)"
        in _refusal(LoraConfig(r=2, modules_to_save=["lm_heda"])).problems[0]
    )
    assert "feedforward_modules: 'down_prj'" in _refusal(IA3Config(feedforward_modules=["down_prj"])).problems[0]
    assert "target_modules does not" in _refusal(IA3Config(target_modules=["k_proj"], feedforward_modules=["down_proj"])).problems[0]


def test_nothing_left():
    error = _refusal(LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=["q_proj"]))
    assert "leaves no module" in error.problems[0]
    assert "leaves no module" in _refusal(LoraConfig(r=2, target_modules=["lm_head"], layers_to_transform=[0])).problems[0]
    assert _refusal(LoraConfig(r=2, target_modules=[])).problems and _refusal(IA3Config(target_modules=[])).problems


def test_layers_that_do_not_exist():
    assert "layer 2 does not exist; there are 0..1" in _refusal(LoraConfig(r=2, layers_to_transform=[0, 2, -1])).problems[1]
    assert "layers 0..1" in _refusal(BottleneckConfig(layers_to_transform=5)).message
    assert _refusal(BottleneckConfig(layers_to_transform=[]))


def test_kinds_that_a_method_cannot_take():
    assert (
        "model.norm is a norm layer; this method takes linear, conv1d, embedding"
        in _refusal(LoraConfig(r=2, target_modules=["norm"])).problems[0]
    )
    for method in (LoraConfig(r=2, use_dora=True, target_modules=["embed_tokens"]), IA3Config(target_modules=["embed_tokens"])):
        assert "is a embedding layer" in _refusal(method).problems[0] or "is an embedding layer" in _refusal(method).problems[0]


def test_a_rank_above_the_smaller_side():
    error = _refusal(LoraConfig(r=30, target_modules=["q_proj", "k_proj"]))
    assert error.problems == tuple(f"model.layers.{i}.self_attn.k_proj: rank 30 is above its smaller side 24" for i in (0, 1))
    assert len(_refusal(LoraConfig(r=400)).problems) == 9  # eight, and how many more
    assert _refusal(LoraConfig(r=2, target_modules=["k_proj"], rank_pattern={"k_proj": 25})).problems


def test_a_module_both_targeted_and_saved():
    assert (
        "both in target_modules and in modules_to_save"
        in _refusal(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["q_proj"])).problems[0]
    )
    assert "both in target_modules and in modules_to_save" in _refusal(IA3Config(modules_to_save=["k_proj"])).problems[0]


def test_virtual_tokens_that_leave_no_position():
    for cls in (PromptTuningConfig, PrefixTuningConfig):
        assert "512 positions" in _refusal(cls(num_virtual_tokens=512)).message
        assert cls(num_virtual_tokens=511).sites(LLAMA)


def test_an_initial_text_without_tokens():
    base = base_of("llama")
    text = Adapter.create(base, PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="TEXT", prompt_tuning_init_text="ab"))
    rows = text.params["prompt_embeddings"]
    assert rows[0].equal(rows[2]) and rows[2].equal(rows[4]) and rows[1].equal(rows[3]) and not rows[0].equal(rows[1])
    with pytest.raises(ConfigError, match="prompt_tuning_init_text"):
        PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="  ")


# ---- refusals of the config alone --------------------------------------------------------------------------------------------------------

WRONG = [
    (LoraConfig, {"r": 0}, "r = 0"),
    (LoraConfig, {"r": -1}, "r = -1"),
    (LoraConfig, {"r": 5000}, "r = 5000"),
    (LoraConfig, {"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] = 0"),
    (LoraConfig, {"rank_pattern": {"(q_proj": 2}}, "rank_pattern: '(q_proj' is not a regular expression"),
    (LoraConfig, {"lora_alpha": 0}, "lora_alpha = 0"),
    (LoraConfig, {"lora_alpha": math.nan}, "lora_alpha = nan"),
    (LoraConfig, {"alpha_pattern": {"q_proj": -2}}, "alpha_pattern['q_proj'] = -2"),
    (LoraConfig, {"lora_dropout": 1.0}, "lora_dropout = 1.0"),
    (LoraConfig, {"lora_dropout": -0.1}, "lora_dropout = -0.1"),
    (BottleneckConfig, {"variant": "houlsbi"}, "did you mean 'houlsby'"),
    (BottleneckConfig, {"non_linearity": "rellu"}, "did you mean 'relu'"),
    (BottleneckConfig, {"reduction_factor": 0}, "reduction_factor = 0"),
    (BottleneckConfig, {"reduction_factor": math.inf}, "reduction_factor = inf"),
    (BottleneckConfig, {"scaling": 0.0}, "scaling = 0.0"),
    (BottleneckConfig, {"dropout": 1.5}, "dropout = 1.5"),
    (PromptTuningConfig, {"num_virtual_tokens": 0}, "num_virtual_tokens = 0"),
    (PromptTuningConfig, {"prompt_tuning_init": "TXT"}, "did you mean 'TEXT'"),
    (PromptTuningConfig, {"prompt_tuning_init": "TEXT"}, "needs prompt_tuning_init_text"),
    (PrefixTuningConfig, {"num_virtual_tokens": -3}, "num_virtual_tokens = -3"),
    (PrefixTuningConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size = 0"),
    (PrefixTuningConfig, {"prefix_init": "random"}, "prefix_init = 'random'"),
    (PrefixTuningConfig, {"prefix_init_text": " "}, "needs prefix_init_text"),
    (LoraConfig, {"r": "sixteen"}, "r = 'sixteen'"),
    (LoraConfig, {"r": 1.5}, "r = 1.5"),
    (LoraConfig, {"target_modules": 3}, "target_modules = 3"),
    (LoraConfig, {"rank_pattern": [1]}, "rank_pattern = [1]"),
    (IA3Config, {"feedforward_modules": {"a": 1}}, "feedforward_modules = {'a': 1}"),
]


@pytest.mark.parametrize(("cls", "fields", "words"), WRONG, ids=[f"{c.name}-{next(iter(f))}-{i}" for i, (c, f, _) in enumerate(WRONG)])
def test_wrong_values_are_refused_by_name_and_value(cls, fields, words):
    with pytest.raises(ConfigError) as e:
        cls.from_dict(fields)
    assert len(e.value.problems) == 1 and words in e.value.problems[0]
    with pytest.raises(ConfigError):
        cls(**fields)


def test_all_wrong_values_are_listed_together():
    with pytest.raises(ConfigError) as e:
        LoraConfig(r=0, lora_alpha=-1, lora_dropout=2.0)
    assert len(e.value.problems) == 3
    with pytest.raises(ConfigError) as e:
        LoraConfig(r="x", lora_dropout="y")
    assert len(e.value.problems) == 2


@pytest.mark.parametrize("cls", METHODS.values(), ids=lambda c: c.name)
def test_unknown_keys_are_refused_with_the_nearest_known_one(cls):
    known = dataclasses.fields(cls)[-1].name
    with pytest.raises(ConfigError) as e:
        cls.from_dict({known + "x": 1, "qqqqqq": 2}, where="variants.a")
    assert e.value.message.startswith("variants.a")
    assert e.value.problems == (f"unknown key {known + 'x'!r} (did you mean {known!r}?)", "unknown key 'qqqqqq'")
    assert known in e.value.fix


def test_what_yaml_gives_is_taken():
    method = LoraConfig.from_dict(
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}, "layers_to_transform": [0]}
    )
    assert method.lora_alpha == 16.0 and isinstance(method.lora_alpha, float)
    assert method.target_modules == ("q_proj",) and method.layers_to_transform == (0,)
    assert LoraConfig.from_dict(method.to_dict()) == method


@pytest.mark.parametrize("method", [m for cls in METHODS.values() for m in cls.examples()], ids=lambda m: m.name)
def test_fields_round_trip(method):
    assert type(method).from_dict(method.to_dict()) == method
