"""A browser, and apps on a port of this machine for it to open."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from trimtab.http import server

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)

EVIL = '<img src=x onerror="window.hacked=1"></td><script>window.hacked=2</script>javascript:alert(1)\'"&amp;{{7*7}}'
"""A name, row, answer or error that would do something if it were taken for markup."""


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The address of an app that runs on a thread."""
    with server.bind("127.0.0.1", 0) as sock:
        made = uvicorn.Server(uvicorn.Config(app, ws="none", lifespan="off", log_level="warning", access_log=False))
        thread = threading.Thread(target=made.run, args=([sock],), daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not made.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}/"
        finally:
            made.should_exit = made.force_exit = True
            thread.join(20)


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, as Debian has it. Skips the test, with the reason, where that cannot be had."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


class Visit:
    """A page of a fresh browser context, which notes whatever would be wrong on any screen: exceptions, errors on the console (a breach of
    the policy is one), dialogs, and requests that leave the server."""

    def __init__(self, started: Any, url: str, where: str = "", *, width: int = 1280, scheme: str = "light", bypass_csp: bool = False):
        self.context = started.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=bypass_csp, reduced_motion="reduce"
        )
        self.page, self.url = self.context.new_page(), url
        self.page.set_default_timeout(45_000)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(f"exception: {error} {error.stack}"))
        self.page.on(
            "console", lambda message: self.wrong.append(f"console: {message.text}") if message.type in ("error", "warning") else None
        )
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda r: self.wrong.append(f"request: {r.url}") if not r.url.startswith((url, "data:")) else None)
        self.page.goto(url + where)

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, kind: object, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert self.wrong == [], self.wrong


def refuse_overflow(page: Any) -> None:
    """AssertionError where the page is wider than the window, or a text is cut off that cannot be scrolled to."""
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    cut = page.evaluate(
        """() => [...document.querySelectorAll('main *')].filter((e) => {
             const style = getComputedStyle(e);
             return e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 1 && ['hidden', 'clip'].includes(style.overflowX) &&
               !e.closest('.plot') && e.tagName !== 'INPUT' && style.textOverflow !== 'ellipsis' && style.clipPath === 'none';
           }).map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert cut == []


def is_harmless(page: Any, hostile: str) -> None:
    """AssertionError where markup from data has become an element, or where its text is not shown."""
    assert page.evaluate("document.querySelectorAll('img, iframe, script:not([src$=\"page.js\"]), object, embed').length") == 0
    assert page.evaluate("window.hacked") is None
    assert hostile in page.evaluate("document.body.textContent")
