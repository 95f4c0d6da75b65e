"""`trimtab studio` as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import uvicorn
from click.testing import CliRunner

from tests.http.process import first_line
from tests.train.past import run_folder, variant
from trimtab.cli import main
from trimtab.cli.studio import _store
from trimtab.errors import TrimtabError
from trimtab.http.server import MAX_HEAD
from trimtab.store.registry import Store


def test_a_folder_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["studio", str(tmp_path / "absent")])
    assert result.exit_code == 2 and "absent" in result.output and "fix:" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_it_shows_runs_until_ctrl_c(tmp_path: Path, host: str) -> None:
    run_folder(tmp_path / "r", {"v": variant()})
    log = tmp_path / "log"
    with log.open("w") as errors:
        command = [sys.executable, "-m", "trimtab", "studio", str(tmp_path), "--port", "0", "--json", "--host", host]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            url, _, token = first_line(process, log)["url"].partition("#key=")
            url = url.replace("0.0.0.0", "127.0.0.1")
            assert httpx.get(url).headers["content-security-policy"].startswith("default-src 'none'")
            answer = httpx.get(f"{url}studio/runs", headers={"authorization": f"Bearer {token}"} if token else {})
            assert [r["name"] for r in answer.raise_for_status().json()["runs"]] == ["r"]
            assert httpx.post(f"{url}studio/order", json={"id": "x", "do": "pause"}).status_code == 401
            if host == "0.0.0.0":
                assert len(token) >= 32 and httpx.get(f"{url}studio/runs").status_code == 401
            else:
                assert len(token) >= 32 and httpx.get(f"{url}studio/runs", headers={"host": "evil.example"}).status_code == 403
            with socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as bad:
                bad.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * MAX_HEAD)
                bad.settimeout(10)
                assert bad.recv(4096).startswith(b"HTTP/1.1 431")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in (0, 130)
        finally:
            process.kill()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()
    assert "Traceback" not in log.read_text()


def test_a_store_that_is_not_there_yet_is_made_by_the_first_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert _store(tmp_path / "new") == (None, tmp_path / "new") and not (tmp_path / "new").exists()
    Store(tmp_path / "made", create=True)
    store, new = _store(tmp_path / "made")
    assert store is not None and store.root == tmp_path / "made" and new is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(TrimtabError):
        _store(tmp_path / "other")
    monkeypatch.setenv("TRIMTAB_STORE", str(tmp_path / "other"))
    assert _store(None) == (None, None), "a folder of something else is left alone"
    monkeypatch.setenv("TRIMTAB_STORE", str(tmp_path / "none"))
    assert _store(None) == (None, tmp_path / "none")


@pytest.mark.parametrize(("store", "told"), [("new", True), ("made", False), (None, False)])
def test_a_store_that_was_named_and_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str | None, told: bool):
    """It may be a slip of the pen."""
    Store(tmp_path / "made", create=True)
    monkeypatch.setenv("TRIMTAB_STORE", str(tmp_path / "none"))
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_: None)
    named = ["--store", str(tmp_path / store)] if store else []
    result = CliRunner().invoke(main, ["studio", str(tmp_path), "--port", "0", *named])
    assert result.exit_code == 0 and f"showing the runs in {tmp_path}" in result.output
    assert (f"there is no store in {tmp_path / 'new'} yet: the first adapter that is published makes it" in result.output) == told
