"""Publishing, aliases, export and download in a real browser."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.store.common import stirred
from tests.train.past import run_folder, variant
from tests.web.common import EVIL, Visit, is_harmless, refuse_overflow, serving
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.methods import LoraConfig
from trimtab.model import load_base
from trimtab.store.registry import Store
from trimtab.train.follow import RunFolders

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Iterator[Shown]:
    root = tmp_path_factory.mktemp("shelf")
    run = run_folder(root / "runs" / "done", {"v": variant()})
    base = load_base(str(tiny_llama_folder), dtype="float32")
    for seed, name in ((1, "v"), (2, "w")):
        stirred(base, LoraConfig(r=4), seed=seed).save(run / "adapters" / name)
    made = Shown(RunFolders(root / "runs"), Store(root / "store", create=True), key="k", base=str(tiny_llama_folder))
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(shown: Shown) -> Iterator[str]:
    with serving(create_studio(shown)) as found:
        yield found


def publish(page: Any, variant: str, alias: str = "") -> None:
    page.get_by_role("combobox", name="Variant").select_option(variant)
    page.get_by_role("textbox", name="Name in the store").fill("acme/support")
    page.get_by_role("textbox", name="Alias, if any").fill(alias)
    page.get_by_role("button", name="Publish", exact=True).click()


def test_from_a_run_to_an_exported_folder(chromium: Any, shown: Shown, url: str):
    store = shown.store
    assert store is not None
    with Visit(chromium, url, "#key=k") as page:
        page.get_by_role("link", name="Adapters").click()
        publish(page, "v", "prod")
        page.get_by_text("Published as acme/support@1").wait_for(timeout=60_000)
        publish(page, "w")
        page.get_by_text("Published as acme/support@2").wait_for(timeout=60_000)
        page.get_by_role("link", name="acme/support@2").click()
        page.get_by_role("textbox", name="Alias for acme/support@2").fill("prod")
        page.get_by_role("button", name="Move it here", exact=True).click()
        page.get_by_text("acme/support@prod is acme/support@2.").wait_for()
        assert store.resolve("acme/support@prod").version == 2
        page.get_by_role("button", name="Take prod away").click()
        page.get_by_text("acme/support@prod is no more.").wait_for()
        assert page.get_by_role("heading", name="What differs").count() == 1
        with page.expect_download() as download:
            page.get_by_role("button", name="Download as it is").click()
        with zipfile.ZipFile(download.value.path()) as zipped:
            assert set(zipped.namelist()) == set(store.resolve("acme/support@2").files)
        page.get_by_role("combobox", name="Format").select_option("peft")
        page.get_by_role("textbox", name="Folder").fill("for-peft")
        page.get_by_role("button", name="Export", exact=True).click()
        page.get_by_text(f"Written: {shown.runs.root / 'for-peft'}").wait_for(timeout=90_000)
        assert (shown.runs.root / "for-peft" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_markup_in_fields_and_errors_stays_text(chromium: Any, shown: Shown, url: str, width: int, scheme: str):
    assert shown.store is not None
    seen = EVIL.partition("'")[0]  # the command that is shown has it with its quotation marks escaped
    shown.store.publish(shown.runs.root / "done" / "adapters" / "v", "acme/other")
    visit = Visit(chromium, url, "#key=k", width=width, scheme=scheme)
    page = visit.page
    page.get_by_role("link", name="Adapters").click()
    page.get_by_role("textbox", name="Name in the store").fill(EVIL)
    page.get_by_role("button", name="Publish", exact=True).click()
    page.get_by_role("alert").wait_for()
    is_harmless(page, seen)
    refuse_overflow(page)
    page.get_by_role("link", name="acme/other@1").click()
    page.get_by_role("textbox", name="Alias for acme/other@1").fill(EVIL)
    page.get_by_role("button", name="Move it here", exact=True).click()
    page.get_by_role("alert").wait_for()
    is_harmless(page, seen)
    refuse_overflow(page)
    visit.context.close()
    assert all("400" in told for told in visit.wrong), visit.wrong
