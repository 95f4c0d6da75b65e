"""Weighted combinations: exact where they say so, equal to peft's where they are the same thing, refused where there is no sum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.common import one_thread
from tests.store.common import SEQUENCES, stirred, tiny_base
from tests.tiny import tiny_model
from trimtab.errors import AdapterError, ConfigError
from trimtab.methods import BottleneckConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from trimtab.store import Adapter
from trimtab.store.combine import HOW, combine
from trimtab.store.combine_edits import reduction_factor
from trimtab.store.factors import Factors, approximated, distance, factors_of, truncated

__all__ = ["one_thread"]

WEIGHTS = (0.7, -0.4, 1.3)
LORAS = (
    LoraConfig(r=4, lora_alpha=8),
    LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=("q_proj", "down_proj", "embed_tokens")),
    LoraConfig(r=2, rank_pattern={"mlp.*": 6}, alpha_pattern={"mlp.*": 3}, layers_to_transform=(1,)),
)


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def loras(base) -> list[Adapter]:
    return [stirred(base, m, seed=i) for i, m in enumerate(LORAS)]


def delta(adapter: Adapter, name: str) -> Tensor:
    """ΔW written out from the tensors, by the formula of the paper."""
    site = next((s for s in adapter.sites if s.name == name), None)
    if site is None:
        return torch.zeros(())
    A, B = (adapter.params[site.key(t)].double() for t in site.shapes)
    return site.scaling * B @ A


def logits_of_sum(base, adapters: list[Adapter], weights: tuple[float, ...], ids: list[int]) -> Tensor:
    """Logits of a model whose weights are W + Σ wᵢ ΔWᵢ, computed by transformers."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name in {s.name for a in adapters for s in a.sites}:
            total = sum(w * delta(a, name) for w, a in zip(weights, adapters, strict=True))
            model.get_submodule(name).weight += (total.T if name == "model.embed_tokens" else total).float()
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_exact_is_the_sum_of_the_weight_changes(base, loras, tmp_path):
    """Ranks, alphas, targets, rsLoRA, patterns and an embedding mixed; and what is saved is what was computed."""
    combined, report = combine(loras, WEIGHTS)
    for site in combined.sites:
        want = sum(w * delta(a, site.name) for w, a in zip(WEIGHTS, loras, strict=True))
        assert float((delta(combined, site.name) - want).norm() / want.norm()) < 1e-6
    assert {s.name for s in combined.sites} == {s.name for a in loras for s in a.sites}
    assert report.error < 1e-6 and max(report.errors.values()) < 1e-6 and report.rank_error is None
    assert report.ranks["model.layers.0.self_attn.q_proj"] == 7 and report.ranks["model.layers.1.mlp.down_proj"] == 13
    got = base.logits([SEQUENCES[0]], adapters=[combined])[0]
    torch.testing.assert_close(got, logits_of_sum(base, loras, WEIGHTS, SEQUENCES[0]), rtol=0, atol=2e-4)
    combined.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a", base)
    assert loaded.verified and all(torch.equal(loaded.params[k], t) for k, t in combined.params.items())
    (tmp_path / "a" / "trimtab.json").unlink()
    assert Adapter.load(tmp_path / "a", base).sites == combined.sites


def test_more_ranks_than_a_module_has_sides_stay_exact(base):
    many = [stirred(base, LoraConfig(r=20, target_modules=("k_proj",)), seed=i) for i in range(3)]
    _combined, report = combine(many)
    assert set(report.ranks.values()) == {24}  # 60 ranks, 24 outputs
    assert report.error < 1e-6


def test_svd_is_the_best_approximation(base, loras):
    combined, report = combine(loras, WEIGHTS, how="svd", rank=3)
    for site in combined.sites:
        want = sum(w * delta(a, site.name) for w, a in zip(WEIGHTS, loras, strict=True))
        sizes = torch.linalg.svdvals(want)
        best = float(sizes[3:].norm() / sizes.norm())
        assert report.errors[site.name] == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert float((delta(combined, site.name) - want).norm() / want.norm()) == pytest.approx(best, rel=1e-4, abs=1e-6)
    whole = math.hypot(*(e * float(n) for e, n in _sizes(loras, report)))
    assert report.error == pytest.approx(whole / math.hypot(*(float(n) for _, n in _sizes(loras, report))), rel=1e-6)
    assert set(report.ranks.values()) == {3} and 0.1 < report.error < 1


def _sizes(loras, report):
    names = list(report.errors)
    return [(report.errors[n], sum(w * delta(a, n) for w, a in zip(WEIGHTS, loras, strict=True)).norm()) for n in names]


def test_errors_are_measured_on_what_is_returned(base, loras):
    """The report's error of one module, computed by hand from the tensors of the adapter that came out."""
    for how in HOW:
        combined, report = combine(loras, WEIGHTS, how=how, seed=3)
        name = "model.layers.0.self_attn.q_proj"
        want = sum(w * delta(a, name) for w, a in zip(WEIGHTS, loras, strict=True))
        assert report.errors[name] == pytest.approx(float((delta(combined, name) - want).norm() / want.norm()), rel=1e-4, abs=1e-6)
        assert (report.rank_error is None) == (how in ("exact", "svd"))


def test_ties_by_hand():
    """Yadav et al.'s three steps on numbers that one can follow: density 0.5 keeps two of four entries."""
    from trimtab.store.sparsify import ties

    one, two = torch.tensor([[2.0, -1.0, 3.0, 0.5]]), torch.tensor([[-4.0, -3.0, 1.0, 0.1]])
    # trimmed: [2, 0, 3, 0] and [-4, -3, 0, 0]; elected: - (2 - 4), - (-3), + (3), + (0)
    assert ties([one, two], [1.0, 1.0], 0.5).tolist() == [[-4.0, -3.0, 3.0, 0.0]]
    # both agree on the last entry here: trimmed [0, 6, 0, 4], [0, 0, 2, 8]; the mean of 4 and 8 is over two
    assert ties([torch.tensor([[1.0, 6, 1, 4]]), torch.tensor([[1.0, 1, 2, 8]])], [1.0, 0.5], 0.5).tolist() == [[0.0, 6.0, 1.0, 4.0]]


def test_dare_keeps_the_expected_value_and_is_seeded(base, loras):
    from trimtab.store.sparsify import dare_linear

    big = torch.ones(200, 200)
    got = dare_linear([big], [1.0], 0.25, torch.Generator().manual_seed(0))
    assert set(got.unique().tolist()) == {0.0, 4.0} and float(got.mean()) == pytest.approx(1.0, abs=0.03)
    same, again, other = (combine(loras, WEIGHTS, how="dare_linear", seed=s)[0] for s in (1, 1, 2))
    assert all(torch.equal(same.params[k], again.params[k]) for k in same.params)
    assert not all(torch.equal(same.params[k], other.params[k]) for k in same.params)


def test_nothing_dropped_is_svd(base, loras):
    """At density 1 DARE drops nothing: what is left is the SVD of the exact sum."""
    svd, thinned = (combine(loras, WEIGHTS, how=how, rank=4, density=1.0)[0] for how in ("svd", "dare_linear"))
    for name, factors in factors_of(svd).items():
        assert distance(factors, factors_of(thinned)[name]) < 1e-5 * factors.norm()


def test_the_report_tells_thinning_from_truncation(base, loras):
    _, full = combine(loras, WEIGHTS, how="ties", density=0.2, rank=24)
    _, small = combine(loras, WEIGHTS, how="ties", density=0.2, rank=2)
    assert full.rank_error < small.rank_error < 1
    assert small.error > 0.1


# ---- peft ----


def _peft_combined(adapters: list[Adapter], weights: list[float], tmp_path, **options: Any) -> dict[str, Tensor]:
    """module -> ΔW as peft's add_weighted_adapter combines the same folders."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    for i, adapter in enumerate(adapters):
        adapter.save(tmp_path / f"a{i}")
        if i == 0:
            wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "a0", adapter_name="a0")
        else:
            wrapped.load_adapter(tmp_path / f"a{i}", adapter_name=f"a{i}")
    wrapped.add_weighted_adapter([f"a{i}" for i in range(len(adapters))], list(weights), "sum", **options)
    modules = dict(wrapped.base_model.model.named_modules())
    names = {s.name for a in adapters for s in a.sites}
    return {n: modules[n].get_delta_weight("sum").detach().double() for n in names}


SAME = (LoraConfig(r=4, lora_alpha=8), LoraConfig(r=4, lora_alpha=3, use_rslora=True))


@pytest.mark.parametrize("how", ["exact", "svd", "ties", "dare_linear", "dare_ties"])
def test_peft_combines_to_the_same(base, how, tmp_path, monkeypatch):
    adapters, weights = [stirred(base, m, seed=i) for i, m in enumerate(SAME)], [0.6, -0.3]
    options: dict[str, Any] = {"exact": {}, "svd": {"rank": 3}}.get(how, {"rank": 3, "density": 0.3})
    theirs = {"exact": "cat", "svd": "svd"}.get(how, f"{how}_svd")
    if how.startswith("dare"):
        _same_draws(monkeypatch)
    wanted = _peft_combined(
        adapters,
        weights,
        tmp_path,
        combination_type=theirs,
        svd_rank=options.get("rank"),
        density=options.get("density"),
    )
    combined, _ = combine(adapters, weights, how=how, **options)
    assert len(wanted) == 14
    for name, want in wanted.items():
        assert float((delta(combined, name) - want).norm() / want.norm()) < 1e-4, name


def _same_draws(monkeypatch) -> None:
    """peft draws its masks from torch's global generator and ours from a seeded one: give both the mask of a tensor's first value."""
    import peft.utils.merge_utils as theirs

    from trimtab.store import sparsify

    def mask(tensor: Tensor, density: float) -> Tensor:
        seed = int(abs(float(tensor.flatten()[0])) * 1e5)
        return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < density

    monkeypatch.setattr(theirs, "random_pruning", lambda tensor, density, rescale: tensor * mask(tensor, density) / density)
    monkeypatch.setattr(sparsify, "_dropped", lambda delta, density, generator: delta * mask(delta, density) / density)


# ---- other methods ----


def test_ia3_adds_what_each_adds_to_the_weights(base, tmp_path):
    adapters = [
        stirred(base, IA3Config(), seed=1),
        stirred(base, IA3Config(target_modules=("k_proj", "up_proj"), feedforward_modules=()), seed=2),
    ]
    combined, report = combine(adapters, [0.5, 2.0])
    by_hand = {}
    for weight, adapter in zip([0.5, 2.0], adapters, strict=True):
        for key, tensor in adapter.params.items():
            by_hand[key] = by_hand.get(key, 1.0) + weight * (tensor - 1.0)
    assert set(combined.params) == set(by_hand)
    for key, want in by_hand.items():
        torch.testing.assert_close(combined.params[key], want, rtol=0, atol=1e-6)
    assert report.error < 1e-6
    combined.save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a", base).sites == combined.sites


def test_ia3_with_weights_that_sum_to_one_is_pefts_average(base, tmp_path):
    peft = pytest.importorskip("peft")
    adapters = [stirred(base, IA3Config(), seed=i) for i in (1, 2)]
    for i, adapter in enumerate(adapters):
        adapter.save(tmp_path / f"a{i}")
    model = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a0", adapter_name="a0")
    model.load_adapter(tmp_path / "a1", adapter_name="a1")
    model.add_weighted_adapter(["a0", "a1"], [0.25, 0.75], "sum")
    combined, _ = combine(adapters, [0.25, 0.75])
    modules = dict(model.base_model.model.named_modules())
    for site in combined.sites:
        theirs = modules[site.name].ia3_l["sum"].detach().reshape(site.shapes["ia3_l"])
        torch.testing.assert_close(combined.params[site.key("ia3_l")], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            BottleneckConfig(reduction_factor=4, scaling=2.0),
            BottleneckConfig(reduction_factor=7, variant="pfeiffer", layers_to_transform=1),
        ),
        (
            BottleneckConfig(reduction_factor=9, variant="pfeiffer", layers_to_transform=0),
            BottleneckConfig(reduction_factor=3, variant="pfeiffer"),
        ),
        (
            BottleneckConfig(variant="parallel", non_linearity="tanh"),
            BottleneckConfig(variant="parallel", non_linearity="tanh", scaling=4.0),
        ),
        (
            BottleneckConfig(variant="pfeiffer", layers_to_transform=1),
            BottleneckConfig(variant="pfeiffer", layers_to_transform=1, reduction_factor=2),
        ),
    ],
)
def test_bottlenecks_side_by_side_add_what_each_adds(base, first, second, tmp_path):
    """At each module, on the same input: the combination's edit is the weighted sum of the edits, written out by the formula."""
    adapters, weights = [stirred(base, first, seed=1), stirred(base, second, seed=2)], (0.5, -1.5)
    combined, report = combine(adapters, weights)
    h = torch.randn(5, base.spec.hidden_size, generator=torch.Generator().manual_seed(0))

    def edit(adapter: Adapter, name: str) -> Tensor:
        site = next((s for s in adapter.sites if s.name == name), None)
        if site is None:
            return torch.zeros_like(h)
        D, d, U, u = (adapter.params[site.key(t)] for t in site.shapes)
        f = {"relu": torch.relu, "tanh": torch.tanh}[adapter.method.non_linearity]
        return site.scaling * (f(h @ D.T + d) @ U.T + u)

    for site in combined.sites:
        want = sum(w * edit(a, site.name) for w, a in zip(weights, adapters, strict=True))
        assert float(want.norm()) > 0
        torch.testing.assert_close(edit(combined, site.name), want, rtol=1e-4, atol=1e-5)
    assert {s.name for s in combined.sites} >= {s.name for a in adapters for s in a.sites}
    assert report.error < 1e-6
    combined.save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a", base).sites == combined.sites


@pytest.mark.parametrize("hidden", [48, 576, 4095])
def test_a_reduction_factor_gives_the_width_that_was_asked_for(hidden):
    for width in (*range(1, 130), hidden, 2 * hidden + 1):
        assert int(hidden // reduction_factor(hidden, width)) == width


# ---- refusals ----


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ((LoraConfig(r=2), IA3Config()), "different methods: lora, ia3"),
        ((LoraConfig(r=2), LoraConfig(r=2, use_dora=True)), "adapter 2 is a DoRA"),
        ((LoraConfig(r=2, modules_to_save=("lm_head",)), LoraConfig(r=2)), "adapter 1 holds lm_head trained in full"),
        ((PromptTuningConfig(), PromptTuningConfig()), "nobody trained"),
        ((PrefixTuningConfig(), PrefixTuningConfig()), "nobody trained"),
        ((IA3Config(), IA3Config(feedforward_modules=())), "one scales its input, another its output"),
        ((BottleneckConfig(), BottleneckConfig(non_linearity="gelu")), "non-linearities differ"),
        ((BottleneckConfig(), BottleneckConfig(variant="parallel")), "one bottleneck reads one"),
    ],
)
def test_what_has_no_sum_is_refused_with_the_reason(base, methods, words):
    with pytest.raises(AdapterError, match=words):
        combine([stirred(base, m, seed=i) for i, m in enumerate(methods)])


def test_wrong_arguments_are_listed_together(base, loras):
    with pytest.raises(ConfigError) as e:
        combine(loras, [1.0, 0.0], how="tie", density=0.0, rank=0)
    assert len(e.value.problems) == 5 and "did you mean 'ties'" in str(e.value)
    with pytest.raises(ConfigError, match="exact combination keeps all ranks"):
        combine(loras, rank=4)
    with pytest.raises(ConfigError, match="at least two"):
        combine(loras[:1])
    with pytest.raises(AdapterError, match="ia3 has none"):
        combine([stirred(base, IA3Config(), seed=i) for i in (1, 2)], how="svd")


def test_adapters_of_different_bases_are_refused(base, loras):
    other = tiny_base(seed=5, fingerprint="sha256:other")
    with pytest.raises(AdapterError, match="adapter 2 is on another base"):
        combine([loras[0], stirred(other, LORAS[0])])
    copy = tiny_base()
    assert combine([loras[0], stirred(copy, LORAS[0])])[1].error < 1e-6


# ---- the algebra ----


def test_factors_agree_with_the_product_written_out():
    generator = torch.Generator().manual_seed(0)
    for rank, O, I in [(3, 10, 7), (9, 10, 7), (12, 10, 7), (4, 5, 40)]:
        one, two = (
            Factors(torch.randn(rank, I, generator=generator).double(), torch.randn(O, rank, generator=generator).double())
            for _ in range(2)
        )
        M, N = one.B_OR @ one.A_RI, two.B_OR @ two.A_RI
        assert one.norm() == pytest.approx(float(M.norm()), rel=1e-12)
        assert distance(one, two) == pytest.approx(float((M - N).norm()), rel=1e-12)
        assert distance(one, one) < 1e-12 * one.norm()
        for k in (1, 2, 5):
            best = float(torch.linalg.svdvals(M)[k:].norm())
            for cut in (truncated(one, k), approximated(M, k)):
                assert cut.rank == min(k, O, I, max(rank, cut.rank)) <= k
                assert float((cut.B_OR @ cut.A_RI - M).norm()) == pytest.approx(best, rel=1e-6, abs=1e-6)
                torch.testing.assert_close(cut.A_RI.norm(dim=1), cut.B_OR.norm(dim=0), rtol=1e-6, atol=1e-6)
