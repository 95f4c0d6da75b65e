"""The doctor reports, never raises, and never goes to the network."""

import socket

import pytest

from trimtab.bases import bundled, doctor, examine

NAMES = ["python", "torch", "transformers", "threads", "device", "bfloat16", "kernels", "memory", "cache", "disk", "bundled base"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the doctor went to the network"))


def by_name():
    return {check.name: check for check in examine()}


def test_every_check_is_there_and_advises_where_it_fails(own_cache):
    checks = examine()
    assert [check.name for check in checks if check.name != "attention"] == NAMES  # that one is there where there is a GPU
    assert all(check.value for check in checks)
    assert all(check.advice for check in checks if not check.ok)
    assert not own_cache.exists()


def test_base_to_be_downloaded(own_cache, monkeypatch):
    monkeypatch.setattr(doctor, "find_gguf", lambda: None)
    check = by_name()["bundled base"]
    assert check.ok and "downloaded at first use" in check.value and "--no-deps" in check.advice and "first use" not in check.advice


def test_wrong_file_is_found(own_cache, tmp_path, monkeypatch):
    wrong = tmp_path / "x.gguf"
    wrong.write_bytes(b"GGUF")
    monkeypatch.setattr(doctor, "find_gguf", lambda: wrong)
    check = by_name()["bundled base"]
    assert not check.ok and str(wrong) in check.value and "reinstall" in check.advice


def test_converted_base_that_differs(own_cache, tiny_llama_folder, monkeypatch):
    import shutil

    folder = shutil.copytree(tiny_llama_folder, bundled.bundled_folder())
    (folder / "trimtab_base.json").write_text("{}")
    check = by_name()["bundled base"]
    assert not check.ok and "differs" in check.value and str(folder) in check.advice


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file" / "below"))
    check = by_name()["cache"]
    assert not check.ok and "TRIMTAB_CACHE" in check.advice


def test_a_check_that_breaks_is_reported(monkeypatch):
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 1 / 0)
    assert "ZeroDivisionError" in by_name()["threads"].value
