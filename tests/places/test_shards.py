"""Ranks that share a base out train what one process does, in every format, and have their part of the base and little else.

The reference is the run in one process, which has the whole base.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.places.forked import in_ranks
from tests.places.test_lost import check_resumed, dying, read
from tests.places.test_ranks import CASES, SGD, compare, quick, steady, validated
from tests.store.common import SEQUENCES, stirred
from tests.store.common import tiny_base as of_family
from tests.tiny import FAMILIES, MORE_FAMILIES, tiny_folder, tiny_tokenizer
from tests.train.common import METHODS, run_file, tiny_base
from trimtab.bases import fits
from trimtab.bases.fingerprint import fingerprint_model
from trimtab.bases.shapes import read_architecture
from trimtab.bases.sharding import matrices_in, shard
from trimtab.bases.unchanged import Watch
from trimtab.cli import main
from trimtab.cost.room import at_most
from trimtab.memory import OutOfMemory
from trimtab.methods import LoraConfig
from trimtab.model import Base, load_base
from trimtab.places.place import Place
from trimtab.places.shards import Shards, Unit
from trimtab.train import RunConfig, train
from trimtab.train.listen import Silent

Config = Callable[[Path], RunConfig]


def shared(config: Config) -> Config:
    """The same run, but for what trains whole models, on ranks that share the base out."""

    def changed(folder: Path) -> RunConfig:
        run = config(folder)
        return run.model_copy(update={"shard": True, "variants": [v for v in run.variants if v.method.name != "full"]})

    return changed


def follow(config: Config, ranks: int, folder: Path) -> None:
    one, many = train(shared(config)(folder / "one" / "run"), base=tiny_base()), shared(config)(folder / "many" / "run")
    assert in_ranks(ranks, lambda place: compare(one, many, place), folder / "log") == [0] * ranks, read(folder / "log")


LORA = METHODS["lora"] | {"lora_dropout": 0.0}
BESIDE: dict[str, dict[str, Any]] = {
    "saved": LORA | {"data": "a", "modules_to_save": ["lm_head", "input_layernorm"]},
    "saved_embedding": LORA | {"data": "b", "modules_to_save": ["embed_tokens"]},
    "ends": LORA | {"data": "b", "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "dora": LORA | {"data": "a", "target_modules": ["lm_head", "down_proj"], "use_dora": True},
    "olora": LORA | {"data": "a", "init_lora_weights": "olora"},
}
"""What reads the base's matrices beside its forward, or stands in for them."""


def beside(folder: Path) -> RunConfig:
    return validated(folder, BESIDE, eval_every=2)


def test_two_ranks_follow_one(tmp_path: Path) -> None:
    follow(quick, 2, tmp_path)


@pytest.mark.slow
def test_what_reads_the_base_beside_its_forward(tmp_path: Path) -> None:
    follow(steady(beside, **SGD), 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("quick", "ended_early")])
def test_ranks_follow_one(name: str, ranks: int, tmp_path: Path) -> None:
    follow(CASES[name], ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "quantize"), [("bfloat16", None), ("float32", "nf4"), ("bfloat16", "nf4-double"), ("float32", "int8")])
def test_formats_equal_ranks_that_have_the_whole_base(dtype: str, quantize: str | None, tmp_path: Path) -> None:
    """To the bit: the same forwards run on the same numbers. The base is loaded layer by layer."""
    base = str(tiny_folder(tmp_path / "base", dtype=torch.bfloat16))
    keys = {"base": base, "dtype": dtype, "quantize": quantize, "activation_checkpointing": True, "evaluate": {"generate": False}}
    variants = {n: m | {"data": "a"} for n, m in METHODS.items() if n in ("lora", "dora", "ia3", "prompt")}
    runs = [RunConfig.from_dict(run_file(tmp_path / n, variants, **keys), root=tmp_path / n) for n in ("whole", "parts")]

    def work(place: Place) -> None:
        whole, parts = (train(run.model_copy(update={"shard": i == 1}), place=place) for i, run in enumerate(runs))
        for name, adapter in whole.adapters.items():
            for key, tensor in adapter.params.items():
                assert torch.equal(parts.adapters[name].params[key], tensor), (name, key)
        assert parts.base.fingerprint == whole.base.fingerprint
        assert parts.base.packed_as == (quantize or "")

    assert in_ranks(2, work, tmp_path / "log") == [0, 0], read(tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("float32", "nf4"), ("bfloat16", "int8")])
def test_experts_are_shared_out_while_they_are_read(
    dtype: str, quantize: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3-D weights, with LoRA on them and on attention: equal to one process, and no rank has the whole base at any time."""
    folder = tmp_path / "base"
    config = AutoConfig.for_model("qwen3_moe", **MORE_FAMILIES["qwen3_moe"] | {"num_hidden_layers": 14, "moe_intermediate_size": 64})
    dense = config.num_experts * 2 * config.moe_intermediate_size * config.hidden_size * 4 if quantize else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    keys = {"base": str(folder), "dtype": dtype, "quantize": quantize, "evaluate": {"generate": False}, "defaults": {"max_steps": 2}}
    aims = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    variants = {"lora": LORA | SGD | aims | {"data": "a"}, "ia3": METHODS["ia3"] | SGD | {"data": "b"}}
    one, many = (RunConfig.from_dict(run_file(tmp_path / n, variants, **keys), root=tmp_path / n) for n in ("one", "many"))
    alone = train(one)

    def work(place: Place) -> None:
        seen = list[int]()
        add = Shards.add

        def added(self: Shards, *args: Any) -> None:
            gc.collect()
            alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) in KEPT}
            seen.append(sum(alive.values()) - before)
            add(self, *args)

        monkeypatch.setattr(Shards, "add", added)
        gc.collect()
        before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) in KEPT}.values())
        shards = place.shards()
        assert shards is not None
        base = load_base(str(folder), dtype=dtype, quantize=quantize, device="cpu", shards=shards)
        monkeypatch.undo()
        matrices = sum(t.nbytes for own in matrices_in(alone.base.model).values() for t in own)
        assert abs(2 * shards.own_bytes - matrices) <= 2 * 64 * len(shards.units)
        layer = max(sum(u.nbytes for u in shards.units if u.owner is owner) for owner in base.model.model.layers)
        ends = sum(m.weight.nbytes for m in (alone.base.model.model.embed_tokens, alone.base.model.lm_head))  # shared out last
        most = shards.own_bytes + ends // 2 + layer + dense  # of what is quantised here a parameter is there as it was stored
        assert len(seen) > 14 and max(seen) < most < matrices, (seen, most, matrices)
        parts = train(many.model_copy(update={"shard": True}), base=base, place=place)
        for name, adapter in alone.adapters.items():
            for key, tensor in adapter.params.items():
                near = {"rtol": 1e-4, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.05, "atol": 1e-3}
                torch.testing.assert_close(parts.adapters[name].params[key], tensor, **near, msg=lambda m, k=(name, key): f"{k}: {m}")

    assert in_ranks(2, work, tmp_path / "log") == [0, 0], read(tmp_path / "log")


KEPT = (Tensor, torch.nn.Parameter)


@dataclass
class Counted:
    """How much of units is in memory at once, as it is counted where they come and go."""

    now: int = 0
    most: int = 0


def counted(patch: pytest.MonkeyPatch) -> Counted:
    found, make_room, free = Counted(), Unit.make_room, Unit.free

    def come(unit: Unit) -> None:
        found.now += unit.nbytes * (not unit.is_there)
        found.most = max(found.most, found.now)
        make_room(unit)

    def go(unit: Unit) -> None:
        found.now -= unit.nbytes * unit.is_there
        free(unit)

    patch.setattr(Unit, "make_room", come)
    patch.setattr(Unit, "free", go)
    return found


def of_six_layers() -> Base:
    config = AutoConfig.for_model("llama", **FAMILIES["llama"] | {"num_hidden_layers": 6})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Base(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer())


def test_a_rank_has_its_part_and_two_layers_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through forwards and backwards; and ranks may compute different things, as often as each likes."""

    whole, parts = of_six_layers(), of_six_layers()

    def work(place: Place) -> None:
        matrices = sum(p.nbytes for p in whole.model.parameters() if p.dim() > 1)
        seen = counted(monkeypatch)
        shards = place.shards()
        assert shards is not None
        parts.shard(shards)
        seen.now = seen.most = 0
        assert 0 <= 3 * shards.own_bytes - matrices <= 3 * 64 * len(shards.units)
        assert sum(u.whole.untyped_storage().nbytes() for u in shards.units) == 0
        adapters = [stirred(b, LoraConfig(r=2, target_modules="all-linear")) for b in (whole, parts)]
        for n in range(place.rank + 1):
            grads = []
            for base, adapter in zip((whole, parts), adapters, strict=True):
                leaves = [p.requires_grad_() for p in adapter.params.values()]
                logits = base.logits(SEQUENCES[n:], [adapter] * len(SEQUENCES[n:]), grad=True)
                grads.append([logits[0], *torch.autograd.grad(logits[0].square().sum(), leaves)])
            assert all(map(torch.equal, *grads))
        assert place.added([1])[0] == 3
        layer = next(u.nbytes for u in shards.units if u.number == 1)
        assert layer <= seen.most <= 2 * max(u.nbytes for u in shards.units), (seen, layer)
        assert place.rank == 0 or seen.most > layer  # the second time the next unit comes while one is used

    assert in_ranks(3, work, tmp_path / "log") == [0, 0, 0], read(tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "gemma3n_text", "deepseek_v3"])
def test_families(family: str, tmp_path: Path) -> None:
    """Logits, gradients with and without layers that run again, and answers through a cache; of matrices that are transposed, of experts,
    of embeddings for each layer, of layers that differ."""

    def work(place: Place) -> None:
        base, shards = of_family(family), place.shards()
        assert shards is not None
        before, whole = fingerprint_model(base.model), results(base, place.rank)
        base.shard(shards)
        assert fingerprint_model(base.model) == before
        for a, b in zip(whole, results(base, place.rank), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        place.added([1])

    assert in_ranks(2, work, tmp_path / "log") == [0, 0], read(tmp_path / "log")


def results(base: Base, rank: int) -> list[Tensor]:
    adapter, found = stirred(base, LoraConfig(r=2)), []
    leaves = [p.requires_grad_() for p in adapter.params.values()]
    for again in (False, True):
        base.attached.activation_checkpointing = again
        logits = base.logits(SEQUENCES[rank:], [adapter, None, adapter][rank:], grad=True)
        found += [*logits, *torch.autograd.grad(sum(t.square().mean() for t in logits), leaves)]
    answers = base.generate_ids(SEQUENCES[rank:], [adapter, None, adapter][rank:])
    return [*(t.detach() for t in found), *(torch.tensor([float(i) for i in ids]) for ids in answers)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_is_named_and_others_go_on_with_the_whole_base(victim: int, tmp_path: Path) -> None:
    one, run = train(quick(tmp_path / "one"), base=tiny_base()), shared(quick)(tmp_path)

    def work(place: Place) -> None:
        with place.told():
            train(run, base=tiny_base(), place=place, **{"beside": dying(3)} if place.rank == victim else {})

    codes = in_ranks(2, work, tmp_path / "log" / "killed")
    said = (tmp_path / "log" / "killed" / f"{1 - victim}.txt").read_text()
    assert codes[victim] == -9 and codes[1 - victim] == 1, said
    assert f"rank {victim} of 2" in said and "has ended" in said and "step-00000003" in said
    check_resumed(quick if victim else shared(quick), tmp_path, one, 1 if victim else 3)


def test_a_write_to_a_part_is_seen(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        base, shards = tiny_base(), place.shards()
        assert shards is not None
        base.shard(shards)
        watch, generation = Watch(base.model), base.attached.weights.look()
        assert watch.before == fingerprint_model(tiny_base().model) == watch.now(base.model)
        assert base.attached.weights.look() == generation
        if place.rank:
            shards.units[1].own.data[5] ^= 1
        changed = watch.now(base.model)
        assert (changed == watch.before) == (place.rank == 0)
        place.added([1])

    assert in_ranks(2, work, tmp_path / "log") == [0, 0], read(tmp_path / "log")


@pytest.mark.parametrize("quantize", [None, "nf4", "fp4-double", "int8"])
def test_nothing_keeps_what_was_shared_out(quantize: str | None, tmp_path: Path) -> None:
    """A tensor that was made as a view of another one would keep that one, whole, on every rank."""
    base = load_base(str(tiny_folder(tmp_path / "base", dtype=torch.bfloat16)), dtype="bfloat16", quantize=quantize, device="cpu")
    model = base.model
    before = {t.untyped_storage().data_ptr() for own in matrices_in(model).values() for t in own}
    shards = Shards(0, 2, 2)
    shard(model, base.spec, shards)
    gc.collect()
    kept = {id(t) for t in shards.kept(model)}
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter) and id(t) not in kept]
    left = [t for t in tensors if t.untyped_storage().nbytes() and t.untyped_storage().data_ptr() in before]
    assert len(before) > 10 and not left, [(tuple(t.shape), t.dtype) for t in left]
    shards.close()


def test_what_is_refused(tmp_path: Path) -> None:
    variants = {"all": METHODS["full"] | {"data": "a"}}
    run = RunConfig.from_dict(run_file(tmp_path, variants, shard=True), root=tmp_path)

    def work(place: Place) -> None:
        with place.told():
            train(run, base=tiny_base(), place=place)

    assert in_ranks(2, work, tmp_path / "log") == [1, 1]
    said = (tmp_path / "log" / "0.txt").read_text()
    assert "variants.all: method full trains a copy of the whole base" in said and "take `shard` away" in said
    (tmp_path / "run.yaml").write_text("bases: x\n")
    heard = CliRunner().invoke(main, ["train", str(tmp_path / "run.yaml"), "--shard"])
    assert heard.exit_code == 2 and "of no use without --ranks" in heard.output


def test_one_process_says_that_it_has_the_whole_base(tmp_path: Path) -> None:
    heard = list[str]()

    class Told(Silent):
        def warning(self, text: str) -> None:
            heard.append(text)

    run = shared(quick)(tmp_path).model_copy(update={"variants": shared(quick)(tmp_path).variants[:1]})
    train(run, base=tiny_base(), listener=Told())
    assert any("one process holds the whole base" in text for text in heard)


def test_memory_is_asked_for_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "base")
    whole = fits.weight_bytes(folder, torch.bfloat16)[1]
    monkeypatch.setattr(fits, "obtainable_bytes", lambda: whole // 2)
    there = Shards(0, 4, 1)
    fits.refuse_too_large("b", folder, torch.bfloat16, torch.device("cpu"), shards=there)
    with pytest.raises(OutOfMemory):
        fits.refuse_too_large("b", folder, torch.bfloat16, torch.device("cpu"), shards=Shards(0, 4, 4))
    shape = read_architecture("smollm2-135m-instruct")
    content = run_file(tmp_path, {"v": METHODS["lora"] | {"data": "a"}}, dtype="bfloat16", evaluate={"generate": False})
    run = RunConfig.from_dict(content, root=tmp_path)
    saved = at_most(run, shape).bytes()[0] - at_most(run, shape, 4).bytes()[0]
    assert saved == pytest.approx(2 * (0.75 * shape.parameters - 2 * 49152 * 576), rel=1e-3)  # the embedding is larger than a layer
