"""The card beside an adapter: what it says, that nothing from data is more than text in it, and that nobody's own words are replaced."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from tests.store.common import EXAMPLES, stirred, tiny_base
from trimtab.errors import AdapterError
from trimtab.methods import BottleneckConfig, IA3Config, LoraConfig, PromptTuningConfig
from trimtab.methods.base import Method
from trimtab.store import Adapter
from trimtab.store.card import CARD, is_untouched, vllm_problems

RUN = {
    "variant": "support-lora",
    "options": {"lr": 1e-3, "epochs": 2, "max_steps": None},
    "steps": 40,
    "data_digest": "sha256:abc",
    "metrics": {"rows": 400, "loss": 0.312345678, "exact_match": 67.0},
    "base_metrics": {"rows": 400, "loss": 2.5},
}


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def card(base: Any, method: Method, folder: Path, run: dict[str, Any] | None = None) -> str:
    return (stirred(base, method).save(folder, run=run) / CARD).read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, Any]:
    found = ModelCard(text).data.to_dict()
    assert found == yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.mark.parametrize(("name", "method"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_every_method_has_a_card_and_loads_beside_it(base, name, method, tmp_path):
    text = card(base, method, tmp_path / "a")
    assert Adapter.load(tmp_path / "a", base).verified
    assert f"# {method.name} adapter" in text and "sha256:tiny" in text and "trimtab generate --base tiny-llama" in text
    assert front_matter(text).get("library_name") == ("peft" if method.in_peft else None)
    assert ("PeftModel.from_pretrained" in text) == method.in_peft
    assert ("cannot be merged" in text) == (not method.mergeable)
    assert json.loads((tmp_path / "a" / "trimtab.json").read_text())["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_what_it_says(base, tmp_path):
    text = card(base, LoraConfig(r=12, target_modules=("q_proj",)), tmp_path / "a", RUN)
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    for said in (
        f"| parameters | {2 * 12 * (48 + 48):,} in 4 tensors, {size:,} bytes |",
        "| training rows | `sha256:abc` |",
        "## Scores on 400 held-out rows",
        "| `loss` | 2.5 | 0.312346 |",
        "| `exact_match` | – | 67 |",
        "--max-lora-rank 16",  # the least of vLLM's that holds 12
    ):
        assert said in text, said
    settings = yaml.safe_load(re.search("```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert settings["method"] == "lora" and settings["fields"]["r"] == 12
    assert settings["options"] == {"lr": 1e-3, "epochs": 2} and settings["steps"] == 40
    assert "base_model" not in front_matter(text), "the hub refuses a card whose base_model is no hub id"


def test_a_base_of_the_hub_is_linked(base, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "name", "org/base-1.5")
    monkeypatch.chdir(tmp_path)
    text = card(base, LoraConfig(r=2), tmp_path / "a")
    assert front_matter(text)["base_model"] == "org/base-1.5"
    assert 'from_pretrained("org/base-1.5")' in text and "vllm serve org/base-1.5" in text
    (tmp_path / "org" / "base-1.5").mkdir(parents=True)
    assert "base_model" not in front_matter(card(base, LoraConfig(r=2), tmp_path / "b")), "a folder of that name is what was loaded"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (IA3Config(), "it knows LoRA, and this is ia3"),
        (PromptTuningConfig(num_virtual_tokens=2), "it knows LoRA, and this is prompt"),
        (BottleneckConfig(), "it knows LoRA, and this is bottleneck"),
        (LoraConfig(r=2, use_dora=True), "it has no DoRA"),
        (LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",)), "it has no modules_to_save"),
        (LoraConfig(r=2, target_modules=("q_proj", "embed_tokens")), "it has no LoRA on embeddings"),
        (LoraConfig(r=2, rank_pattern={"q_proj": 4}), "rank and scaling differ between modules"),
        (LoraConfig(r=2, alpha_pattern={"q_proj": 4.5}), "rank and scaling differ between modules"),
    ],
    ids=lambda v: "" if isinstance(v, str) else v.name,
)
def test_what_vllm_cannot_load_is_said(base, method, said, tmp_path):
    text = card(base, method, tmp_path / "a")
    assert said in text and "vllm serve" not in text


def test_one_rank_however_written_is_fine_for_vllm(base):
    method = LoraConfig(r=2, rank_pattern={".*": 4}, alpha_pattern={".*": 8}, use_rslora=True)
    assert vllm_problems(method, method.sites(base.spec)) == []


HOSTILE = [
    "---\nlicense: mit\n---\n# owned",
    "x\n---\nbase_model: evil/model",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "`` </code><b>bold</b> `",
    "a ` <script>alert(1)</script> ` b `` <b>evil</b> `` c",
    "```\n<script>alert(1)</script>\n```",
    "| a | b |\n|---|---|\n[link](javascript:alert(1)) ![i](http://evil/x.png) https://evil.example",
    "<!-- trimtab wrote this card -->",
    "\u202egnp.exe \u0000 \x1b[31m red \ud800",
    "'; rm -rf / #",
    "x" * 100_000,
    "`" * 300,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_comes_from_data_is_only_text(base, text, tmp_path, monkeypatch):
    """In the name of the base, keys and values of settings, names of scores: rendered, it is never markup, and the front matter stays."""
    monkeypatch.setattr(base, "name", text)
    calm = re.sub(r"[\ud800-\udfff]", "?", text)  # json.dumps would write it, but no UTF-8 file holds it
    run = {calm: calm, "options": {calm: [calm, {calm: 1}]}, "data_digest": calm, "metrics": {calm: 1.0, "loss": 2.0}}
    written = card(base, LoraConfig(r=2), tmp_path / "a", run)
    assert front_matter(written) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["trimtab", "lora"]}
    body = written.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    assert [t.content for t in tokens if t.type == "html_block"] == [written[written.rindex("<!-- trimtab wrote") :]]
    inline = [c for t in tokens for c in t.children or []]
    assert {c.type for c in inline} <= {"text", "code_inline", "softbreak"}, "no link, image or HTML"
    assert [t.content for t in inline if t.type == "text" and ("evil" in t.content or "alert" in t.content)] == []
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert headings == ["lora adapter", "Settings", "Scores on held-out rows", "Use"]
    assert len(written) < 40_000 and all(c.isprintable() or c == "\n" for c in written)
    assert is_untouched(tmp_path / "a" / CARD)
    commands = [t.content for t in tokens if t.type == "fence" and t.info in ("bash", "python")]
    assert not any("rm -rf" in c or "script" in c for c in commands), "a name that needs quoting is not put into a command"


def test_an_untouched_card_is_replaced_and_an_edited_one_never(base, tmp_path):
    adapter, file = stirred(base, LoraConfig(r=2)), tmp_path / "a" / CARD
    adapter.save(tmp_path / "a")
    adapter.save(tmp_path / "a", run=RUN)
    assert "0.312346" in file.read_text() and is_untouched(file)
    edited = file.read_text().replace("## Use", "My own words.\n\n## Use")
    file.write_text(edited)
    with pytest.raises(AdapterError, match=r"already holds README\.md, which would be lost"):
        adapter.save(tmp_path / "a")
    assert file.read_text() == edited
    assert Adapter.load(tmp_path / "a", base).info["run"]["steps"] == 40, "the adapter is what it was"


@pytest.mark.parametrize(
    "content", ["", "# mine\n", "<!-- trimtab wrote this card: sha256:" + "0" * 64 + " -->\n", "\n<!--\n", "x" * 2**21]
)
def test_other_peoples_cards_stay(base, tmp_path, content):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / CARD).write_text(content)
    with pytest.raises(AdapterError, match=r"README\.md"):
        stirred(base, IA3Config()).save(tmp_path / "a")
    assert (tmp_path / "a" / CARD).read_text() == content


def test_a_card_behind_a_link_is_not_ours(base, tmp_path):
    stirred(base, IA3Config()).save(tmp_path / "a")
    (tmp_path / "a" / CARD).rename(tmp_path / "card")
    (tmp_path / "a" / CARD).symlink_to(tmp_path / "card")
    assert not is_untouched(tmp_path / "a" / CARD)
    with pytest.raises(AdapterError, match=r"README\.md"):
        stirred(base, IA3Config()).save(tmp_path / "a")
