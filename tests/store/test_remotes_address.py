"""URLs of adapters elsewhere: what is read, what is refused, and that no secret is ever shown."""

from __future__ import annotations

import pytest

from trimtab.errors import AdapterError
from trimtab.store.registry import Store
from trimtab.store.remotes import pull, push
from trimtab.store.remotes.address import parse_address, redacted


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("acme/support", "no URL"),
        ("s3:/bucket/x", "no URL"),
        ("HF://a/b", "no URL"),
        ("simplecache::s3://bucket/x", "no URL"),
        ("s3://bucket/x::file:///etc", "chained URLs"),
        ("s3://bucket/a b", "blanks"),
        ("s3://id:key@bucket/x", "carries a user name or password"),
        ("oci://user:secret@registry.example.com/a/b", "carries a user name or password"),
        ("hf://user:hf_secret@acme/support", "carries a user name or password"),
        ("s3://bucket/x?X-Amz-Signature=abc", "carries a query"),
        ("s3://", "names no folder"),
        ("s3://[bucket/x", "is no URL"),
        ("file://[::1", "is no URL"),
        ("s3://bucket/../other", "leaves it through"),
        ("file://srv/adapters", "stands where a host would"),
        ("memory://shared#acme", "not a name in a store"),
        ("oci://registry.example.com/Acme/support", "no repository of an OCI registry"),
        ("oci://registry.example.com/acme/support:a/b", "no repository of an OCI registry"),
        ("oci://registry.example.com/acme/../support", "no repository of an OCI registry"),
        ("oci://registry.example.com/acme/support@sha256:12", "no repository of an OCI registry"),
        ("hf://acme", "no repository of the hub"),
        ("hf://acme/../b", "no repository of the hub"),
        ("hf://acme/support@../../x", "no repository of the hub"),
        ("hf://acme/support/extra", "no repository of the hub"),
    ],
)
def test_a_wrong_url_is_refused_without_showing_secrets(url, words, tmp_path):
    here = Store(tmp_path / "here", create=True)
    for work in (lambda: pull(here, url, "acme/support"), lambda: push(here, "acme/support", url)):
        with pytest.raises(AdapterError, match=words) as error:
            work()
        assert error.value.fix and not any(secret in str(error.value) for secret in ("key@", "secret", "Signature=abc"))
    assert here.list() == []


@pytest.mark.parametrize(
    "url",
    [
        "hf://acme/support-lora",
        "hf://acme/support-lora@refs/pr/3",
        "oci://localhost:5000/acme/support",
        "oci://registry.example.com/a/b/c:v1",
        f"oci://[::1]:5000/support@sha256:{'a' * 64}",
        "s3://bucket/folder#acme/support@3",
    ],
)
def test_an_address_is_shown_as_it_was_written(url):
    assert str(parse_address(url)) == url


def test_plain_http_is_spoken_to_this_machine_only():
    local = {
        "localhost:5000": True,
        "127.0.0.1:5000": True,
        "[::1]": True,
        "127.0.0.1.example.com": False,
        "registry.example.com:80": False,
    }
    assert {host: parse_address(f"oci://{host}/a").is_local for host in local} == local


def test_secrets_are_taken_out_of_what_libraries_say():
    said = "GET https://user:pass@host/blob?X-Amz-Signature=abc&X=1 failed, see 'https://host/x?token=t'"
    assert redacted(said) == "GET https://***@host/blob?*** failed, see 'https://host/x?***'"


def test_nothing_that_a_terminal_would_obey_is_shown():
    assert redacted("blob\x1b]0;owned\x07 unknown\nnext") == "blob ]0;owned  unknown next"
