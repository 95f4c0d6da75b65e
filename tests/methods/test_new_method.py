"""A new method is one file (DESIGN §1): one defined here, known nowhere else, trains, is saved, served mixed, merged, planned."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from tests.store.common import SEQUENCES, stirred, tiny_base
from tests.train.common import METHODS as VARIANTS
from tests.train.common import run
from trimtab import ops
from trimtab.bases.spec import Spec
from trimtab.bases.weights import Weight
from trimtab.cli import main
from trimtab.errors import AdapterError, ConfigError, NotMergeable
from trimtab.methods import BY_NAME, METHODS, Method
from trimtab.methods.base import BaseView, Packed, Params, Site
from trimtab.methods.targets import select
from trimtab.store import Adapter, config_read
from trimtab.train import RunConfig

ROOT = Path(__file__).parent.parent.parent


def shift_output(x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(x) + u on each span; u [O]."""
    y_TO = base(x_TI)
    if ops.gathers(rows, packs):
        for stacked, where, slots in packs.gathered(rows):
            y_TO[where] += stacked("u")[slots]
        return y_TO
    return ops.by_span(y_TO, rows, lambda s, y: y + packs.items[s.slot].tensors["u"])


@pytest.fixture
def shift() -> Iterator[type[Method]]:
    """A learned output bias, in the registry for as long as a test runs."""

    @dataclass(frozen=True, kw_only=True)
    class ShiftConfig(Method):
        peft_type: ClassVar[str] = "SHIFT"
        name: ClassVar[str] = "shift"

        target_modules: str | tuple[str, ...] = ("q_proj", "v_proj")
        scale: float = 1.0
        layers: tuple[int, ...] | None = (0, 1)

        def sites(self, spec: Spec) -> list[Site]:
            chosen = select(spec, self.target_modules, layers=self.layers)
            return [Site(m.name, {"shift.bias": (m.out_features,)}) for m in chosen]

        def init(self, site: Site, base: BaseView, generator: torch.Generator) -> dict[str, Tensor]:
            return {"shift.bias": torch.zeros(site.shapes["shift.bias"])}

        def pack(self, site: Site, params: Params, dtype: torch.dtype, matrix: Weight | None) -> Packed:
            return Packed(shift_output, {"u": (self.scale * params["shift.bias"]).to(dtype)})

        def merge(self, site: Site, weight_OI: Tensor, bias_O: Tensor | None, params: Params) -> tuple[Tensor, Tensor | None]:
            shift_O = self.scale * params["shift.bias"].float()
            return weight_OI.float().clone(), shift_O if bias_O is None else bias_O.float() + shift_O

    yield ShiftConfig
    del METHODS["SHIFT"], BY_NAME["shift"]


def test_it_trains_beside_others_and_its_folder_comes_back(shift: type[Method], tmp_path: Path) -> None:
    variants = {
        "toy": {"method": "shift", "data": "a", "scale": 2.0, "lr": 5e-2, "max_steps": 12},
        "lora": VARIANTS["lora"] | {"data": "b"},
    }
    report = run(tmp_path, variants)
    trained = report.adapters["toy"]
    assert isinstance(trained.method, shift)
    losses = report.summary["variants"]["toy"]["losses"]
    assert losses["last"] < losses["first"]
    base, folder = report.base, tmp_path / "out" / "adapters" / "toy"
    loaded = Adapter.load(folder, base)
    assert loaded.method == trained.method and not loaded.verified  # this base has no fingerprint
    assert loaded.params.keys() == trained.params.keys()
    assert all(torch.equal(loaded.params[k], trained.params[k].detach()) for k in loaded.params)

    prompts, adapters = ["n 3", "n 3", "n 3"], [loaded, None, report.adapters["lora"]]
    mixed = base.generate(prompts, adapters=adapters, max_new_tokens=5)
    assert mixed == [base.generate([p], adapters=[a], max_new_tokens=5)[0] for p, a in zip(prompts, adapters, strict=True)]
    both = base.logits(SEQUENCES[:2], adapters=[loaded, None])
    torch.testing.assert_close(both[0], base.logits(SEQUENCES[:1], adapters=[loaded])[0], rtol=0, atol=1e-5)
    assert float((both[0] - base.logits(SEQUENCES[:1])[0]).abs().max()) > 1e-3


def test_its_learning_rate_has_a_default_and_its_fields_are_checked(shift: type[Method], tmp_path: Path) -> None:
    content = {"base": "x", "out": "out", "data": {"a": {"train": "a.jsonl"}}, "variants": {"toy": {"method": "shift", "data": "a"}}}
    assert RunConfig.from_dict(content).variants[0].lr == 1e-3
    content["variants"]["toy"]["scael"] = 2.0
    with pytest.raises(ConfigError, match=r"variants\.toy\.scael: unknown key \(did you mean 'scale'\?\)"):
        RunConfig.from_dict(content)


@pytest.mark.parametrize("page", ["methods.md", "run-file.md"])
def test_preset_learning_rates_are_those_of_the_documentation(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (listed,) = re.findall(r"(?<=: )lora \S+, .*?full [\d.e-]+\d", text)
    assert {name: float(lr) for name, lr in (part.split() for part in listed.split(", "))} == {n: c.preset_lr for n, c in BY_NAME.items()}


@pytest.mark.parametrize("fields", [{}, {"scale": 0.5, "layers": None}, {"target_modules": "all-linear", "layers": (1,)}])
def test_its_config_alone_says_the_same(shift: type[Method], tmp_path: Path, fields: dict[str, Any]) -> None:
    """Without trimtab.json: every field is in adapter_config.json, under its own name, null too."""
    base = tiny_base()
    method = shift(**fields)
    stirred(base, method).save(tmp_path / "a")
    (tmp_path / "a" / "trimtab.json").unlink()
    assert Adapter.load(tmp_path / "a", base).method == method
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"scale": "wide", "scael": 3}))
    with pytest.raises(AdapterError, match="scael = 3 is not supported"):
        Adapter.load(tmp_path / "a", base)


def test_it_merges_where_the_base_has_a_bias_and_says_where_it_cannot(shift: type[Method], tmp_path: Path) -> None:
    qwen2 = tiny_base("qwen2")
    assert stirred(qwen2, shift(scale=2.0)).merge_into(tmp_path / "merged").max_difference < 1e-4
    llama = tiny_base("llama")
    with pytest.raises(NotMergeable, match=r"layers\.0\.self_attn\.q_proj has no bias in this llama base") as refusal:
        stirred(llama, shift()).merge_into(tmp_path / "not")
    assert "serve the adapter beside the base" in refusal.value.fix
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert Adapter.create(llama, shift()).merge_into(tmp_path / "zero").max_difference == 0.0, "a bias of zeros drops nothing"


def test_the_command_line_knows_it(shift: type[Method]) -> None:
    helped = CliRunner().invoke(main, ["plan", "--help"])
    assert "shift" in helped.output
    planned = CliRunner().invoke(main, ["plan", "gpt2", "--method", "shift", "--set", "target_modules=[c_attn]", "--json"])
    assert json.loads(planned.output)["plans"][0]["trainable"] == 2 * 3 * 768


def test_the_registry_forgets_it() -> None:
    assert "SHIFT" not in METHODS and "shift" not in BY_NAME


def test_a_method_is_read_by_peft_s_keys_or_by_its_own() -> None:
    assert {kind for kind, cls in METHODS.items() if cls.in_peft} == set(config_read._READERS)


@pytest.mark.slow
def test_the_example_of_contributing_is_a_method_once_its_file_is_there(tmp_path: Path) -> None:
    """In a copy of the package, with the kernel and the file as CONTRIBUTING.md has them, and nothing else."""
    kernel, method = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[:2]
    package = shutil.copytree(ROOT / "src" / "trimtab", tmp_path / "trimtab", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "methods" / "bitfit.py").write_text(method, encoding="utf-8")
    with (package / "ops" / "edit.py").open("a", encoding="utf-8") as ops_file:
        ops_file.write(f"\n\n{kernel}")
    code = """
import trimtab
from tests.store.common import SEQUENCES, stirred, tiny_base
from trimtab.methods import BY_NAME
from trimtab.store import Adapter
base = tiny_base()
adapter = stirred(base, BY_NAME["bitfit"]())
adapter.save("a")
loaded = Adapter.load("a", base)
difference = [float((x - y).abs().max()) for x, y in zip(
    base.logits([SEQUENCES[0]] * 2, adapters=[loaded, None]), base.logits([SEQUENCES[0]] * 2, adapters=[adapter, adapter]), strict=True)]
print(trimtab.__file__, difference[0] < 1e-5 < 0.05 < difference[1], *BY_NAME)
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.stdout.split()[:2] == [str(package / "__init__.py"), "True"], done.stderr
    assert set(done.stdout.split()[2:]) == {"bitfit", *BY_NAME} and done.stdout.split()[-1] == "full"
