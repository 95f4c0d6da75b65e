"""Smaller adapters: ranks cut to an error that is what it says, half-precision storage that loads as the rounded values."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.laws.common import one_thread
from tests.store.common import EXAMPLES, SEQUENCES, stirred, tiny_base
from trimtab.bases.load import DTYPES
from trimtab.errors import AdapterError, ConfigError
from trimtab.methods import IA3Config, LoraConfig
from trimtab.store import Adapter
from trimtab.store.compress import compress, rounding_error
from trimtab.store.factors import factors_of

__all__ = ["one_thread"]

MIXED = LoraConfig(
    r=8,
    lora_alpha=12,
    use_rslora=True,
    rank_pattern={"mlp.*": 3},
    alpha_pattern={"mlp.*": 5},
    target_modules=("q_proj", "o_proj", "up_proj"),
)


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    """module -> ΔW, written out from what the forward would use."""
    found = {}
    for site in adapter.sites:
        if not site.saved:
            A, B = (adapter.params[site.key(t)].double() for t in site.shapes)
            found[site.name] = site.scaling * B @ A
    return found


def test_a_rank_keeps_the_largest_singular_values(base):
    adapter = stirred(base, MIXED)
    small, report = compress(adapter, rank=4)
    assert {r for _, r in report.ranks.values()} == {3, 4}  # three stays three
    before, after = deltas(adapter), deltas(small)
    for name, want in before.items():
        sizes = torch.linalg.svdvals(want)
        best = float(sizes[report.ranks[name][1] :].norm() / sizes.norm())
        got = float((after[name] - want).norm() / want.norm())
        assert got == pytest.approx(best, rel=1e-4, abs=1e-6) and report.errors[name] == pytest.approx(got, rel=1e-4, abs=1e-6)
    assert report.parameters == (adapter.num_parameters, small.num_parameters)
    assert report.parameters[1] < report.parameters[0]
    whole = torch.cat([(after[n] - before[n]).flatten() for n in before]).norm() / torch.cat([d.flatten() for d in before.values()]).norm()
    assert report.error == pytest.approx(float(whole), rel=1e-4)


@pytest.mark.parametrize("error", [0.0, 0.05, 0.3, 0.7])
def test_an_error_is_kept_by_the_smallest_rank_that_can(base, error, tmp_path):
    """Each module's error is within the bound and would not be with one rank less; scaling is right in the folder too."""
    adapter = stirred(base, MIXED)
    small, report = compress(adapter, error=error)
    for name, want in deltas(adapter).items():
        sizes, rank = torch.linalg.svdvals(want), report.ranks[name][1]
        assert report.errors[name] <= error + 1e-6
        assert rank == 1 or float(sizes[rank - 1 :].norm() / sizes.norm()) > error
        assert float((deltas(small)[name] - want).norm() / want.norm()) == pytest.approx(report.errors[name], rel=1e-3, abs=1e-6)
    assert report.error <= error + 1e-6
    small.save(tmp_path / "a")
    (tmp_path / "a" / "trimtab.json").unlink()
    loaded = Adapter.load(tmp_path / "a", base)
    assert loaded.sites == small.sites and all(torch.equal(loaded.params[k], t) for k, t in small.params.items())
    if error == 0.3:
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert config["rank_pattern"] and set(config["rank_pattern"]) == set(config["alpha_pattern"])
        assert config["lora_alpha"] == config["r"] and not config["use_rslora"]


def test_peft_loads_a_compressed_folder_with_the_same_logits(base, tmp_path):
    peft = pytest.importorskip("peft")
    from tests.tiny import tiny_model

    small, _ = compress(stirred(base, MIXED), error=0.3)
    small.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a").eval()
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor([SEQUENCES[0]])).logits[0]
    torch.testing.assert_close(base.logits([SEQUENCES[0]], adapters=[small])[0], want, rtol=0, atol=1e-4)


def test_a_low_rank_adapter_in_a_high_rank_file_loses_nothing(base):
    """What training left unused is found: rank 2 stored as rank 6."""
    adapter = stirred(base, LoraConfig(r=6, lora_alpha=6, target_modules=("q_proj",)))
    for site in adapter.sites:
        A, B = (adapter.params[site.key(t)] for t in site.shapes)
        A[2:] = torch.randn(4, 2) @ A[:2]
        assert B.shape[1] == 6
    small, report = compress(adapter, error=1e-5)
    assert {r for _, r in report.ranks.values()} == {2} and report.error < 1e-5
    torch.testing.assert_close(
        base.logits([SEQUENCES[0]], adapters=[small])[0], base.logits([SEQUENCES[0]], adapters=[adapter])[0], rtol=0, atol=1e-4
    )


def test_modules_trained_in_full_are_carried_along(base, tmp_path):
    adapter = stirred(base, LoraConfig(r=6, modules_to_save=("lm_head", "model.norm")))
    small, _ = compress(adapter, rank=2)
    assert all(torch.equal(small.params[f"{n}.weight"], adapter.params[f"{n}.weight"]) for n in ("lm_head", "model.norm"))
    small.save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a", base).method == small.method


def test_factors_are_balanced(base):
    """Neither factor carries the scaling alone, so that half precision rounds both alike."""
    small, _ = compress(stirred(base, LoraConfig(r=6, lora_alpha=600)), rank=3)
    for factors in factors_of(small).values():
        torch.testing.assert_close(factors.A_RI.norm(dim=1), factors.B_OR.norm(dim=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("method", "words"),
    [(IA3Config(), "no low-rank weight change"), (LoraConfig(r=4, use_dora=True), "another BA changes")],
)
def test_what_cannot_be_truncated_says_why(base, method, words):
    with pytest.raises(AdapterError, match=words):
        compress(stirred(base, method), rank=1)


@pytest.mark.parametrize(
    ("options", "words"), [({}, "one of them"), ({"rank": 1, "error": 0.1}, "one of them"), ({"rank": 0}, "at least 1")]
)
def test_wrong_arguments(base, options, words):
    with pytest.raises(ConfigError, match=words):
        compress(stirred(base, LoraConfig(r=2)), **options)
    with pytest.raises(ConfigError, match="at least 0 and below 1"):
        compress(stirred(base, LoraConfig(r=2)), error=1.0)


# ---- storage ----


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "method"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_half_precision_loads_as_the_rounded_values(base, name, method, dtype, tmp_path):
    adapter = stirred(base, method)
    adapter.save(tmp_path / "half", dtype=dtype)
    adapter.save(tmp_path / "full")
    stored = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {DTYPES[dtype]}
    full, half = ((tmp_path / n / "adapter_model.safetensors").stat().st_size for n in ("full", "half"))
    loaded, exported = Adapter.load(tmp_path / "half", base), method.export(adapter.params)[1]
    assert abs(full - half - 2 * sum(t.numel() for t in exported.values())) < 16 * len(exported) + 8  # headers differ a little
    assert loaded.verified
    assert all(torch.equal(loaded.params[k], t.to(DTYPES[dtype]).float()) for k, t in exported.items())
    apart = torch.cat([(loaded.params[k] - t).flatten().double() for k, t in exported.items()]).norm()
    whole = torch.cat([t.flatten().double() for t in exported.values()]).norm()
    assert rounding_error(adapter, dtype) == pytest.approx(float(apart / whole), rel=1e-6)
    assert 0 < rounding_error(adapter, dtype) < {"bfloat16": 2**-8, "float16": 2**-10}[dtype]


def test_values_beyond_a_dtype_are_refused_by_name(base, tmp_path):
    adapter = stirred(base, LoraConfig(r=2, target_modules=("q_proj",)))
    adapter.params["model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = 1e5
    adapter.params["model.layers.1.self_attn.q_proj.lora_B.weight"].mul_(1e-9)
    with pytest.raises(AdapterError) as e:
        adapter.save(tmp_path / "a", dtype="float16")
    assert len(e.value.problems) == 2 and "do not fit float16" in e.value.problems[0] and "all zero in float16" in e.value.problems[1]
    assert list(tmp_path.iterdir()) == []
    adapter.save(tmp_path / "a", dtype="bfloat16")


def test_an_unknown_dtype_is_named(base, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        stirred(base, IA3Config()).save(tmp_path / "a", dtype="bfloat")
