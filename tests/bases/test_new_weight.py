"""A new weight format is one file and a kernel: that of CONTRIBUTING.md, known nowhere else, computes, trains, is saved and served mixed.

Law 19 (tests/laws/test_law19_weights.py) compares it with its dense twin.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.bases.new_weight import FILES, NAME, ROOT, registered, sources
from tests.laws.common import noisy
from tests.tiny import tiny_model, tiny_tokenizer
from tests.train.common import METHODS as VARIANTS
from tests.train.common import run_file
from trimtab import ops
from trimtab.bases.by_layer import held, in_float32_by_layer
from trimtab.bases.weights import FORMATS, Weight, weight_of
from trimtab.errors import BaseError, ConfigError
from trimtab.forward.hosts import Around
from trimtab.forward.packs import PackList
from trimtab.methods import IA3Config, LoraConfig
from trimtab.methods.base import Packed, Rows, Span
from trimtab.model import Base
from trimtab.store import Adapter
from trimtab.store.export import export
from trimtab.train import RunConfig, train

W = [[127.0, -50.0], [0.0, 254.0]]
"""Rows of scales 1 and 2, with whole numbers [127, -50] and [0, 127]: nothing is rounded."""


@pytest.fixture
def stored() -> Iterator[type[Weight]]:
    with registered() as kind:
        yield kind


def base_of(stored: type[Weight], dtype: torch.dtype = torch.float32) -> Base:
    model = tiny_model("llama", dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, stored.of_linear(module))
    return Base(model, tiny_tokenizer(), name="tiny-llama")


def module_of(stored: type[Weight]) -> nn.Module:
    linear = nn.Linear(2, 2).requires_grad_(False)
    linear.weight.copy_(torch.tensor(W))
    linear.bias.copy_(torch.tensor([10.0, 20.0]))
    return stored.of_linear(linear)


def test_its_numbers_by_hand(stored: type[Weight]) -> None:
    module = module_of(stored)
    weight = weight_of(module)
    assert module.weight.tolist() == [[127, -50], [0, 127]] and module.scale.tolist() == [1.0, 2.0]
    assert weight.dense().tolist() == W and weight.dense([1]).tolist() == [[0.0, 254.0]]
    assert weight.nbytes == 4 * 1 + 2 * 4, "four whole numbers of a byte, two scales in fp32"
    # x = [1, 2]: [127 - 100, 508], and the bias
    assert module(torch.tensor([[1.0, 2.0]])).tolist() == [[37.0, 528.0]]
    # dy = [1, 3]: [127, -50 + 762]
    assert weight.matmul_t(torch.tensor([[1.0, 3.0]])).tolist() == [[127.0, 712.0]]


def test_loras_backward_by_hand(stored: type[Weight]) -> None:
    # A = [1, -1], B = [2, 3]ᵀ, x = [1, 2], dy = [1, 3]:  dy B = 2 + 9 = 11;  dx = dy W + 11 A = [127, 712] + [11, -11]
    module = module_of(stored)
    packed = Packed(ops.lora, {"A": torch.tensor([[1.0, -1.0]]), "B": torch.tensor([[2.0], [3.0]])})
    x_TI = torch.tensor([[1.0, 2.0]], requires_grad=True)
    around = Around(module, weight_of(module), 0, module.forward, module.forward)
    ops.lora(x_TI, around, PackList([packed]), Rows((Span(0, 1, 0),), 1, torch.device("cpu"))).backward(torch.tensor([[1.0, 3.0]]))
    assert x_TI.grad.tolist() == [[138.0, 701.0]]


def test_adapters_train_on_it_are_saved_and_served_mixed(stored: type[Weight], tmp_path: Path) -> None:
    base = base_of(stored)
    variants = {name: VARIANTS[name] | {"data": "ab"[i % 2], "max_steps": 12} for i, name in enumerate(("lora", "dora", "prefix"))}
    report = train(RunConfig.from_dict(run_file(tmp_path, variants), root=tmp_path), base=base)
    loaded: list[Adapter | None] = [Adapter.load(tmp_path / "out" / "adapters" / name, base) for name in variants]
    for name in variants:
        losses = report.summary["variants"][name]["losses"]
        assert losses["last"] < losses["first"], name
    prompts, adapters = ["n 3"] * 4, [*loaded, None]
    mixed = base.generate(prompts, adapters=adapters, max_new_tokens=5)
    assert mixed == [base.generate([p], adapters=[a], max_new_tokens=5)[0] for p, a in zip(prompts, adapters, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_copy_in_float32_is_dense_and_an_export_is_compared_on_it(stored: type[Weight], dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_of(stored, dtype)
    copy = in_float32_by_layer(base.model)
    with held(copy):
        for name, weight in base.attached.weights.of.items():
            assert torch.equal(copy.get_submodule(name).weight, weight.dense().float()), name
    report = export(noisy(base, LoraConfig(r=2, use_dora=True)), tmp_path / "exported", "peft")
    assert "peft" in report.checked


def test_copies_of_it_do_not_outlive_a_write(stored: type[Weight]) -> None:
    base = base_of(stored)
    adapter = noisy(base, LoraConfig(r=2, use_dora=True))
    before = base.logits([[1, 2, 3]], [adapter])[0]
    with torch.no_grad():
        base.model.model.layers[0].self_attn.q_proj.weight.add_(1)
    after = base.logits([[1, 2, 3]], [adapter])[0]
    other = Base(base.model, tiny_tokenizer())
    assert torch.equal(after, other.logits([[1, 2, 3]], [Adapter(other, adapter.method, adapter.params)])[0])
    assert not torch.equal(after, before)


def test_no_dense_copy_of_it_is_made_for_the_decode_path(stored: type[Weight], monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode path reads dense weights, or copies them into its layout; of these that would be what the format saves."""
    copied: list[tuple[int, int]] = []
    kept = stored.dense
    monkeypatch.setattr(stored, "dense", lambda w, rows=None: (copied.append(w.shape), kept(w, rows))[1])
    base = base_of(stored, torch.bfloat16)
    base.generate([[1, 2, 3]], max_new_tokens=2)
    if base.attached.decode_path is None:
        pytest.skip("no decode path on this machine")
    copied.clear()
    base.attached.drop_copies()
    base.generate([[1, 2, 3]], max_new_tokens=2)
    assert copied == []


def test_what_would_write_it_is_refused_by_name(stored: type[Weight], tmp_path: Path) -> None:
    base = base_of(stored)
    with pytest.raises(ConfigError, match="modules_to_save: the weight of lm_head is stored as int8-rows") as refusal:
        Adapter.create(base, IA3Config(modules_to_save=("lm_head",)))
    assert "leave it out" in refusal.value.fix
    Adapter.create(base, IA3Config(modules_to_save=("model.norm",)))
    run = RunConfig.from_dict(run_file(tmp_path, {"full": VARIANTS["full"] | {"data": "a"}}), root=tmp_path)
    with pytest.raises(ConfigError, match="full fine-tuning cannot train weights that are stored as int8-rows"):
        train(run, base=base)


def test_a_format_that_is_not_known_is_refused_by_name() -> None:
    with registered() as stored:
        model = base_of(stored).model
    with pytest.raises(BaseError, match="built in a way that trimtab does not know"):
        Base(model, tiny_tokenizer())
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[1].mlp.up_proj.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(BaseError, match=r"the weight of model\.layers\.1\.mlp\.up_proj \(Linear\) is in no format") as refusal:
        Base(model, tiny_tokenizer())
    assert "dense" in refusal.value.fix


def test_the_registry_forgets_it() -> None:
    assert NAME not in FORMATS and not set(FILES) & set(sys.modules)


@pytest.mark.slow
def test_the_example_of_contributing_is_a_format_once_its_two_files_are_there(tmp_path: Path) -> None:
    """In a copy of the package, with the kernel and the file as CONTRIBUTING.md has them, and nothing else."""
    package = shutil.copytree(ROOT / "src" / "trimtab", tmp_path / "trimtab", ignore=shutil.ignore_patterns("__pycache__"))
    for module, source in sources().items():
        assert not (package / FILES[module]).exists()
        (package / FILES[module]).write_text(source, encoding="utf-8")
    code = """
import trimtab
from tests.bases.test_new_weight import base_of
from trimtab.bases.weights import FORMATS
base = base_of(FORMATS["int8-rows"])
print(trimtab.__file__, "int8-rows" in FORMATS, base.logits([[1, 2, 3]])[0].isfinite().all().item())
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.stdout.split() == [str(package / "__init__.py"), "True", "True"], done.stderr
