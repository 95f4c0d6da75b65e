"""What a base's folder must not make us wait for or read: pipes, devices, files of gigabytes, JSON that is nested without end."""

import json
import os
import shutil
import time

import pytest

from tests.tiny import tiny_folder
from trimtab.bases import load
from trimtab.bases.folder import check_folder
from trimtab.bases.shapes import read_architecture
from trimtab.errors import BaseError, DataError
from trimtab.model import load_base

READ = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "model.safetensors"]
MORE = [
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "model.safetensors.index.json",
    "additional_chat_templates/tool.jinja",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "base")


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def made_up(path):
    path.symlink_to("/proc/self/status")


def sparse(path):
    """3 GB that take no room."""
    with path.open("wb") as file:
        file.truncate(3 * 10**9)


HOSTILE = {
    **{kind: (make, "is not a regular file") for kind, make in (("pipe", pipe), ("device", device), ("the kernel's", made_up))},
    "3 GB": (sparse, "3,000,000,000 bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", [*READ, *MORE])
def test_files_that_must_not_be_read(folder, name, kind):
    make, reason = HOSTILE[kind]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    start = time.monotonic()
    with pytest.raises(BaseError) as refused:
        load(str(folder))
    assert time.monotonic() - start < 5
    assert any(path.name in p and (reason in p or "safetensors" in p) for p in refused.value.problems)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "{" + '"a": 1' + "0" * 10_000 + "}"], ids=["lists", "objects", "digits"]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_json_that_cannot_be_parsed(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(BaseError) as refused:
        load(str(folder))
    assert any(f"{name} is not readable JSON" in p for p in refused.value.problems)


@pytest.mark.parametrize("kind", ["3 GB", "device"])
def test_a_config_alone_is_bounded_too(tmp_path, kind):
    (tmp_path / "base").mkdir()
    HOSTILE[kind][0](tmp_path / "base" / "config.json")
    for name in (tmp_path / "base", tmp_path / "base" / "config.json"):
        with pytest.raises(BaseError):
            read_architecture(str(name))


def test_links_of_a_hub_cache_are_followed(whole, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for path in whole.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    check_folder(tmp_path / "snapshot", name="cached")


ENDLESS = ["{% for i in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**10 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"]


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_without_end_is_named_when_the_base_is_used(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    base = load_base(str(folder), dtype="float32", device="cpu")
    start = time.monotonic()
    with pytest.raises(DataError, match="was stopped") as refused:
        base.generate(["Hi"], max_new_tokens=1)
    assert str(folder) in refused.value.message and time.monotonic() - start < 10
