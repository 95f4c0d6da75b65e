"""What the page reads of a server and of its store: a tenant sees its own namespaces, and another's adapter looks like none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http.common import Site, base_of, call, site
from tests.store.common import stirred
from trimtab.http import shelf
from trimtab.http.assemble import Asked
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.methods import LoraConfig
from trimtab.serve.tenants import Tenants
from trimtab.store.registry import Store
from trimtab.train.follow import RunFolders


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store(tmp_path_factory.mktemp("store") / "store", create=True)
    base = base_of()
    for seed, (name, r) in enumerate((("acme/support", 4), ("acme/support", 2), ("bolt/billing", 4), ("acme2/x", 4)), start=1):
        made.publish(stirred(base, LoraConfig(r=r), seed=seed), name, aliases=["prod"] if seed == 1 else [])
    return made


@pytest.fixture(scope="module")
def town(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("town")
    with Tenants(folder / "tenants.db", create=True) as tenants:
        tenants.add("acme")
        tenants.add("bolt")
        tenants.add("root", namespaces=["acme", "bolt"], admin=True)
        keys = {n: tenants.create_key(n)[1] for n in ("acme", "bolt", "root")}
        with site(Asked(store=store, tenants=tenants)) as made:
            yield made, keys
            made.idle()


def get(town: tuple[Site, dict[str, str]], who: str, path: str):
    made, keys = town
    return call(made.app, "GET", f"/studio/{path}", headers={"authorization": f"Bearer {keys[who]}"} if who else {})


def test_a_server_says_what_its_page_can_show(town):
    assert get(town, "", "about").json() | {"version": ""} == {
        "version": "",
        "keyed": True,
        "runs": False,
        "changes": False,
        "rows": False,
        "store": True,
        "serves": True,
    }
    page = call(town[0].app, "GET", "/")
    assert page.status_code == 200 and "script-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["adapters", "adapter?name=acme/support", "version?ref=acme/support", "diff?a=acme/support&b=acme/support@1"]
)
def test_without_a_key_nothing_of_the_store_is_told(town, path: str):
    assert get(town, "", path).status_code == 401


def test_a_tenant_sees_its_namespaces(town, store: Store):
    names = {who: [a["ref"] for a in get(town, who, "adapters").json()["adapters"]] for who in ("acme", "bolt", "root")}
    assert names == {"acme": ["acme/support@2"], "bolt": ["bolt/billing@1"], "root": ["acme/support@2", "bolt/billing@1"]}
    versions = get(town, "acme", "adapter?name=acme/support").json()["versions"]
    assert [(v["version"], v["aliases"]) for v in versions] == [(1, ["prod"]), (2, ["latest"])]
    shown = get(town, "acme", "version?ref=acme/support@prod").json()
    expected = store.resolve("acme/support@1")
    assert (shown["ref"], shown["digest"], shown["bytes"]) == ("acme/support@1", expected.digest, expected.size)
    assert shown["files"]["adapter_config.json"]["digest"] == expected.files["adapter_config.json"].digest
    assert shown["note"]["fields"]["r"] == 4


@pytest.mark.parametrize(
    "path", ["adapter?name={}", "version?ref={}", "version?ref={}@1", "diff?a={}&b=acme/support", "diff?a=acme/support&b={}"]
)
def test_what_is_anothers_looks_like_nothing(town, path: str):
    """The same status and words, whether it is there or not, so that names of others cannot be found by trying."""
    told = [get(town, "acme", path.format(name)) for name in ("bolt/billing", "bolt/nothing", "acme/nothing", "acme2/x")]
    assert [t.status_code for t in told] == [404] * 4
    words = {
        t.json()["error"]["message"].replace(n, "X")
        for t, n in zip(told, ("bolt/billing", "bolt/nothing", "acme/nothing", "acme2/x"), strict=True)
    }
    assert len(words) == 1 and "did you mean" not in str(words)


def test_tensors_are_compared_for_administrators(town, store: Store):
    expected = store.diff("acme/support@1", "acme/support@2")
    path = "diff?a=acme/support@1&b=acme/support"
    mine, all_of_it = get(town, "acme", path).json(), get(town, "root", path).json()
    assert [c["key"] for c in mine["config"]] == [c.key for c in expected.config] and "r" in str(mine["config"])
    assert mine["tensors"] == {} and mine["reshaped"] == []
    assert all_of_it["reshaped"] == list(expected.reshaped) and all_of_it["reshaped"]


@pytest.mark.parametrize(
    ("path", "status"), [("version?ref=", 400), ("version?ref=no-slash", 400), ("version", 400), ("adapter?name=acme/support@1@2", 400)]
)
def test_what_is_no_name_is_a_mistake(town, path: str, status: int):
    assert get(town, "acme", path).status_code == status


@pytest.mark.parametrize(
    ("run", "scores"),
    [
        ({"metrics": {"token_f1": 61.25, "loss": 0.5}}, {"token_f1": ["F1", True, "higher"], "loss": ["loss", False, "lower"]}),
        ({"metrics": 5}, {}),
        ({}, {}),
    ],
)
def test_a_version_says_what_its_scores_mean(tmp_path: Path, run: dict, scores: dict):
    store = Store(tmp_path / "store", create=True)
    store.publish(stirred(base_of(), LoraConfig(r=4), seed=1).save(tmp_path / "adapter", run=run), "acme/a")
    told = shelf.shown(store, shelf.LOCAL, "acme/a")["scores"]
    assert {name: [m["title"], m["percent"], m["better"]] for name, m in told.items()} == scores


def test_names_come_in_pages(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shelf, "MAX_LISTED", 2)
    first = shelf.listed(store, shelf.LOCAL, "")
    second = shelf.listed(store, shelf.LOCAL, first["after"])
    assert [a["name"] for a in first["adapters"]] == ["acme/support", "acme2/x"] and first["more"]
    assert [a["name"] for a in second["adapters"]] == ["bolt/billing"] and not second["more"]


def test_a_damaged_version_hides_no_other(store: Store, tmp_path: Path):
    copied = Store(tmp_path / "store", create=True)
    base = base_of()
    for name in ("acme/a", "acme/b"):
        copied.publish(stirred(base, LoraConfig(r=4), seed=len(name) + ord(name[-1])), name)
    copied.blob_path(copied.resolve("acme/a").digest).unlink()
    assert [a["name"] for a in shelf.listed(Store(tmp_path / "store"), shelf.LOCAL, "")["adapters"]] == ["acme/b"]


def test_a_studio_shows_the_whole_store(store: Store, tmp_path: Path):
    app = create_studio(Shown(RunFolders(tmp_path), store))
    assert call(app, "GET", "/studio/about").json()["store"]
    assert len(call(app, "GET", "/studio/adapters").json()["adapters"]) == 3
    found = call(app, "GET", "/studio/diff?a=acme/support@1&b=bolt/billing").json()
    expected = store.diff("acme/support@1", "bolt/billing")
    assert found["tensors"] == dict(expected.tensors) and any(found["tensors"].values())
    assert call(app, "GET", "/studio/version?ref=acme/nothing").status_code == 404
    keyed = create_studio(Shown(RunFolders(tmp_path), store, "token"))
    for path in ("adapters", "adapter?name=acme/support", "version?ref=acme/support", "diff?a=acme/support&b=acme/support@1"):
        assert call(keyed, "GET", f"/studio/{path}").status_code == 401
    without = create_studio(Shown(RunFolders(tmp_path)))
    assert call(without, "GET", "/studio/adapters").status_code == 404
