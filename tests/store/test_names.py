"""What a name in a store may look like, and that none of them is ever a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import AdapterError
from trimtab.store.names import NoSuchAdapter, Ref, check_alias, default_root, is_reference, missing, parse_name

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "namespace", "name", "selector", "number"),
    [
        ("acme/support", "acme", "support", "", None),
        ("acme/support@3", "acme", "support", "3", 3),
        ("acme/support@prod", "acme", "support", "prod", None),
        ("acme/support@3a", "acme", "support", "3a", None),
        ("4.x/a_b-c@latest", "4.x", "a_b-c", "latest", None),
        (f"acme/support@{DIGEST}", "acme", "support", DIGEST, None),
        (f"a/{'b' * 63}@999999999", "a", "b" * 63, "999999999", 999999999),
    ],
)
def test_a_reference_is_read_and_written_back(text, namespace, name, selector, number):
    ref = Ref.parse(text)
    assert (ref.namespace, ref.name, ref.selector, ref.number) == (namespace, name, selector, number)
    assert str(ref) == text and Ref.parse(ref) is ref and ref.path == f"{namespace}/{name}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "acme",
        "acme/",
        "/support",
        "/etc/passwd",
        "../support",
        "acme/..",
        "acme/support@..",
        "./support",
        "acme/./support",
        "acme/sup/port",
        "acme/Support",
        "acme/süpport",
        "acme/support ",
        "acme/support\n",
        "acme/support@3\n",
        "acme/sup\x00port",
        "acme\\support",
        "acme/support@",
        "acme/support@@3",
        "acme/support@3@4",
        "acme/support@0",
        "acme/support@03",
        "acme/support@9999999999",
        "acme/support:3",
        "acme/support@sha256:" + "0" * 63,
        "acme/support@sha256:" + "A" * 64,
        "acme/support@sha512:" + "0" * 64,
        "-acme/support",
        ".acme/support",
        "a" * 64 + "/support",
        "acme/" + "x" * 10_000,
        "acme/" + "é" * 10_000,
    ],
)
def test_anything_else_is_refused_in_few_words(text):
    with pytest.raises(AdapterError, match="not a name in a store") as refused:
        Ref.parse(text)
    assert len(str(refused.value)) < 600 and refused.value.fix and "\n\n" not in str(refused.value)
    assert not is_reference(text)


def test_a_name_alone_has_no_version():
    assert parse_name("acme/support") == Ref("acme", "support")
    with pytest.raises(AdapterError, match="without a version"):
        parse_name("acme/support@3")


@pytest.mark.parametrize("alias", ["latest", "3", "007", "", "Prod", "a b", "..", "a/b", "x" * 64, DIGEST])
def test_what_cannot_be_an_alias(alias):
    with pytest.raises(AdapterError, match="alias"):
        check_alias(alias)
    assert check_alias("prod.eu-1") == "prod.eu-1"


def test_a_folder_that_is_there_is_no_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_reference("acme/support") and is_reference("acme/support@3")
    Path("acme/support").mkdir(parents=True)
    assert not is_reference("acme/support") and is_reference("acme/support@3")
    Path("acme/broken").symlink_to("nowhere")
    assert not is_reference("acme/broken"), "a link is refused as a folder, not looked up as a name"
    assert not is_reference(Path("acme/other"))


def test_where_the_store_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_STORE", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"
    monkeypatch.delenv("TRIMTAB_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_root() == tmp_path / "data" / "trimtab" / "store"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".local" / "share" / "trimtab" / "store"


def test_what_is_missing_is_said_with_the_nearest_name():
    error = missing(Ref.parse("acme/suport@3"), ["acme/support", "zeta/other"], "/store")
    assert isinstance(error, NoSuchAdapter) and error.http_status == 404
    assert "did you mean 'acme/support'" in str(error)
    assert "did you mean" not in str(missing(Ref.parse("acme/x"), ["zeta/other"], "/store"))
