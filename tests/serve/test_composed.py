"""Composed adapters: equal to peft's merged sum and to transformers over the summed weights, beside others; their names; who shares
what with whom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from tests.serve.common import ask, engine_of, finish
from tests.store.common import stirred
from tests.tiny import tiny_model
from trimtab.errors import TrimtabError
from trimtab.methods import BottleneckConfig, IA3Config, LoraConfig, Method, PrefixTuningConfig
from trimtab.model import Base
from trimtab.serve.composed import MAX_PARTS, Composed, composed, names_in, parts_of
from trimtab.store import Adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
PROMPT = [7, 250, 3, 3, 90, 41, 12, 199, 5, 64, 28, 77, 130, 9]
METHODS: dict[str, Method] = {
    "a": LoraConfig(r=4, lora_alpha=8),
    "rs": LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "i": IA3Config(),
    "j": IA3Config(target_modules="all-linear", feedforward_modules=()),
    "k": IA3Config(target_modules=("q_proj", "v_proj"), feedforward_modules=()),
    "dora": LoraConfig(r=2, use_dora=True),
    "houlsby": BottleneckConfig.examples()[0],  # type: ignore[dict-item]
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
}


@dataclass(frozen=True)
class Named:
    """A servable that has its adapter at hand."""

    ref: str
    adapter: Adapter

    @property
    def digest(self) -> str:
        return f"sha256:{self.ref}"

    def load(self) -> Adapter:
        return self.adapter


@pytest.fixture(scope="module")
def engine():
    return engine_of("llama")


@pytest.fixture(scope="module")
def named(engine) -> dict[str, Named]:
    return {name: Named(name, stirred(engine.base, m, seed=i)) for i, (name, m) in enumerate(METHODS.items())}


def with_peft(base: Base, folder: Path, parts: list[tuple[Named, float]], **how: str) -> Tensor:
    """Logits of peft's own sum of these adapters, from their folders."""
    for part, _ in parts:
        part.adapter.save(folder / part.ref)
    model = peft.PeftModel.from_pretrained(tiny_model("llama"), folder / parts[0][0].ref, adapter_name=parts[0][0].ref)
    for part, _ in parts[1:]:
        model.load_adapter(folder / part.ref, part.ref)
    model.base_model.add_weighted_adapter([p.ref for p, _ in parts], [w for _, w in parts], "sum", **how)
    model.set_adapter("sum")
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([PROMPT])).logits[0]


def over_sums(parts: list[tuple[Named, float]]) -> torch.nn.Module:
    """transformers' model with W + Σ cᵢ W ∘ (lᵢ - 1), in which no code of ours computes."""
    model = tiny_model("llama")
    for module in {s.name for p, _ in parts for s in p.adapter.sites}:
        weight = model.get_submodule(module).weight
        moved = [c * (p.adapter.params[s.key("ia3_l")] - 1) for p, c in parts for s in p.adapter.sites if s.name == module]
        with torch.no_grad():
            weight *= 1 + sum(moved)
    return model


def test_a_sum_is_pefts_in_one_batch_with_everything_else(engine, named, tmp_path):
    lora, ia3 = [(named["a"], 0.7), (named["rs"], -1.3)], [(named["i"], 0.25), (named["i"], 0.5), (named["i"], 1.0)]
    both, scaled = composed(lora), composed(ia3)
    assert both is not None and scaled is not None
    adapters = [None, both.load(), named["prefix"].adapter, scaled.load(), named["a"].adapter]
    got = engine.base.logits([PROMPT] * 5, adapters)
    want = with_peft(engine.base, tmp_path, lora, combination_type="cat")
    assert float((got[1] - want).abs().max()) < 1e-5
    with torch.no_grad():
        assert float((got[3] - over_sums([(named["i"], 1.75)])(input_ids=torch.tensor([PROMPT])).logits[0]).abs().max()) < 1e-5
    assert torch.allclose(got[0], engine.base.logits([PROMPT])[0], atol=1e-5)


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.0, 0.5)])
def test_ia3_is_the_sum_of_what_merging_adds(engine, named, tmp_path, weights):
    """peft's own combination is the same where weights add up to 1; it takes adapters of the same modules only."""
    parts = list(zip((named["j"], Named("j2", stirred(engine.base, METHODS["j"], seed=9))), weights, strict=True))
    whole = composed(parts)
    assert whole is not None
    got = engine.base.logits([PROMPT], [whole.load()])[0]
    with torch.no_grad():
        assert float((got - over_sums(parts)(input_ids=torch.tensor([PROMPT])).logits[0]).abs().max()) < 1e-5
    if sum(weights) == 1:
        assert float((got - with_peft(engine.base, tmp_path, parts)).abs().max()) < 1e-5


def test_answers_of_a_sum_beside_others_are_transformers_own(engine, named):
    parts = [(named["i"], 0.5), (named["k"], 0.8)]
    whole = composed([(named["k"], 0.8), (named["i"], 0.5)])
    heard = ask(engine, "sum", PROMPT, whole, max_tokens=8, logprobs=1)  # type: ignore[arg-type]
    others = [ask(engine, f"o{i}", PROMPT, a, max_tokens=8) for i, a in enumerate((None, named["i"], named["a"]))]  # type: ignore[arg-type]
    finish(engine)
    ids = list(PROMPT)
    for token in heard.tokens:
        with torch.no_grad():
            row = over_sums(parts)(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert token.id == int(row.argmax()) and token.logprob == pytest.approx(float(row.max()), abs=1e-5)
        ids.append(token.id)
    for other, adapter in zip(others, (None, named["i"].adapter, named["a"].adapter), strict=True):
        assert other.ids == ask_alone(engine, adapter)


def ask_alone(engine, adapter: Adapter | None) -> list[int]:
    from trimtab.decode.generate import Sampling

    return engine.base.generate_ids([PROMPT], [adapter], Sampling(8))[0]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("dora", "a"), "DoRA"),
        (("houlsby", "houlsby2"), "bottleneck"),
        (("a", "i"), "different methods: lora, ia3"),
        (("prefix",), "prefix"),
    ],
)
def test_what_has_no_sum_is_refused_by_name_and_alone(engine, named, parts, words):
    more = named | {"houlsby2": Named("houlsby2", stirred(engine.base, METHODS["houlsby"], seed=11))}
    heard = ask(engine, "bad", PROMPT, composed([(more[p], 0.5) for p in parts]), max_tokens=4)  # type: ignore[arg-type]
    good = ask(engine, "good", PROMPT, named["a"], max_tokens=4)  # type: ignore[arg-type]
    finish(engine)
    assert heard.error is not None and heard.error.http_status == 400 and words in heard.error.render()
    assert good.finish in ("stop", "length")


def test_blocks_are_of_the_composition(engine, named):
    """One prompt under an adapter, under it with a scale, and under two sums: none finds what another has left, each finds its own."""
    prompt = list(range(40))
    a, rs = named["a"], named["rs"]
    asked = [composed(p) for p in ([(a, 1)], [(a, 0.5)], [(a, 1), (rs, 0.5)], [(a, 0.5), (rs, 1)])]
    assert asked[0] is a and len({s.digest for s in asked if s is not None}) == 4
    for again in (0, 32):
        for i, servable in enumerate(asked):
            heard = ask(engine, f"{again}-{i}", prompt, servable, max_tokens=1)  # type: ignore[arg-type]
            finish(engine)
            assert heard.deltas[-1].usage.cached == again
    resident = set(engine.residency.digests)
    assert {s.digest for s in asked if s is not None} <= resident
    engine.evict(rs.digest)
    engine.step()
    assert {d for d in engine.residency.digests if rs.digest in parts_of(d)} == set()
    assert {a.digest, f"0.5*{a.digest}"} <= set(engine.residency.digests)
    heard = ask(engine, "after", prompt, asked[2], max_tokens=1)  # type: ignore[arg-type]
    finish(engine)
    assert heard.deltas[-1].usage.cached == 0


def test_parts_are_added_up_and_flattened(named):
    a, rs, i = named["a"], named["rs"], named["i"]
    assert composed([(a, 1.0)]) is a and composed([(a, 0.5), (a, 0.5)]) is a
    assert composed([(a, 0.0)]) is None and composed([(a, 1), (a, -1)]) is None
    assert composed([(a, 1), (rs, 0.5)]) == composed([(rs, 0.5), (a, 1)])
    inner = composed([(a, 1), (rs, 0.5)])
    assert inner is not None
    outer = composed([(inner, 2.0), (i, 1)])
    assert isinstance(outer, Composed) and outer == composed([(a, 2), (rs, 1), (i, 1)])
    assert parts_of(outer.digest) == {a.digest, rs.digest, i.digest} and parts_of(a.digest) == {a.digest}
    with pytest.raises(TrimtabError, match="at most 8"):
        composed([(Named(f"n{n}", a.adapter), 1) for n in range(MAX_PARTS + 1)])


def test_the_name_of_a_sum_is_short_whatever_its_parts_are_called(named):
    """It goes into a header; proxies take 4 kB of all of them by default."""

    far = [Named(f"/srv/{'deep/' * 800}desk{n}", named["a"].adapter) for n in range(MAX_PARTS)]
    whole = composed([(part, 0.123456789) for part in far])
    assert whole is not None and len(whole.ref) < 8 * 80 and all(f"/desk{n}" in whole.ref for n in range(MAX_PARTS))
    assert composed([(named["a"], 1), (named["rs"], 0.5)]).ref in ("a+0.5*rs", "0.5*rs+a")  # type: ignore[union-attr]


def test_names_with_scales_are_read():
    assert names_in("a") is None and names_in("acme/a@3") is None
    assert names_in("a+0.5*b") == [("a", 1.0), ("b", 0.5)]
    assert names_in(" 2*acme/a@prod + -.5*b+1e-2*c ") == [("acme/a@prod", 2.0), ("b", -0.5), ("c", 0.01)]
    assert names_in("0.5*a") == [("a", 0.5)]
    assert names_in("2*3*a") is None  # no name has a star: it is unknown like any other
    assert names_in("a+") is names_in("+") is names_in("+a") is None
    for text in ("101*a+b", "+".join("abcdefghi")):
        with pytest.raises(TrimtabError, match="cannot be composed"):
            names_in(text)
