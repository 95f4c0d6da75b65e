"""Which adapter a name means, to whom, and at what moment; what a folder may be; that foreign and unknown look alike."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.store.common import stirred, tiny_base, write_tensors
from tests.store.test_heads import stirred as headed
from trimtab.errors import AdapterError, NotFoundError, TrimtabError
from trimtab.methods import METHODS, Head
from trimtab.model import Base
from trimtab.serve import served
from trimtab.serve.catalog import Catalog, StoreTrouble
from trimtab.serve.live import snapshot
from trimtab.serve.served import FolderAdapter, below
from trimtab.serve.tenant import LOCAL, Tenant
from trimtab.store import Adapter
from trimtab.store.folder import WEIGHTS
from trimtab.store.registry import Store

ACME, LAW = Tenant("acme", "acme", ("acme", "shared")), Tenant("law", "law", ("law", "shared"))
LORA = METHODS["LORA"].examples()[0]


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base()


@pytest.fixture(scope="module")
def adapters(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of four different adapters."""
    return [stirred(base, LORA, seed=i).save(tmp_path_factory.mktemp("adapters") / f"a{i}") for i in range(4)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


@pytest.fixture
def catalog(base: Base, store: Store) -> Catalog:
    return Catalog(base, store, base_names=(base.name, "assistant"))


def digest(catalog: Catalog, model: str, tenant: Tenant) -> str:
    found = catalog.find(model, tenant)
    assert found is not None
    return found.digest


def refusal(catalog: Catalog, model: str, tenant: Tenant) -> str:
    with pytest.raises(NotFoundError) as caught:
        catalog.find(model, tenant)
    assert caught.value.http_status == 404
    return str(caught.value).replace(model, "<model>").replace(repr(model)[1:-1], "<model>")


def same_tensors(a: Adapter, folder: Path, base: Base) -> bool:
    b = Adapter.load(folder, base)
    return a.params.keys() == b.params.keys() and all(torch.equal(a.params[k], b.params[k]) for k in a.params)


def test_the_base_has_its_names_and_is_never_a_fallback(catalog: Catalog, base: Base) -> None:
    assert catalog.find(base.name, ACME) is None and catalog.find("assistant", LAW) is None
    for model in ("", "Assistant", " assistant", "assistant@1", "shared/assistant", base.name.upper(), "support"):
        refusal(catalog, model, ACME)


def test_a_name_is_found_by_every_form_of_it(catalog: Catalog, store: Store, adapters: list[Path], base: Base) -> None:
    first, second = store.publish(adapters[0], "acme/support"), store.publish(adapters[1], "acme/support", aliases=["prod"])
    for model in (
        "support",
        "acme/support",
        "support@latest",
        "acme/support@2",
        "support@2",
        "acme/support@prod",
        f"support@{second.digest}",
    ):
        assert digest(catalog, model, ACME) == digest(catalog, model, LOCAL) == second.digest
    for model in ("acme/support@1", "support@1", f"acme/support@{first.digest}"):
        found = catalog.find(model, ACME)
        assert found is not None and found.digest == first.digest and found.ref == "acme/support@1"
        assert same_tensors(found.load(), adapters[0], base)


def test_short_names_are_looked_up_in_the_tenants_order(catalog: Catalog, store: Store, adapters: list[Path]) -> None:
    shared = store.publish(adapters[0], "shared/support").digest
    assert digest(catalog, "support", ACME) == digest(catalog, "support", LAW) == digest(catalog, "support", LOCAL) == shared
    own = store.publish(adapters[1], "acme/support").digest
    assert digest(catalog, "support", ACME) == own and digest(catalog, "support", LAW) == shared
    with pytest.raises(AdapterError, match="several namespaces have 'support'"):
        catalog.find("support", LOCAL)


def test_foreign_and_unknown_are_the_same(catalog: Catalog, store: Store, adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    version = store.publish(adapters[0], "law/contracts", aliases=["prod"])
    assert digest(catalog, "contracts", LAW) == version.digest
    foreign = ["law/contracts", "contracts", "law/contracts@1", "law/contracts@prod", f"law/contracts@{version.digest}", "contracts@1"]
    unknown = ["law/nothing", "nothing", "law/contracts@9", "no/where", f"law/contracts@sha256:{'0' * 64}", "acme/contracts", "contract"]
    assert len({refusal(catalog, model, ACME) for model in foreign + unknown}) == 1
    asked: list[str] = []
    real = Store.resolve
    monkeypatch.setattr(Store, "resolve", lambda self, ref: (asked.append(str(ref)), real(self, ref))[1])
    for model in foreign + unknown:
        refusal(catalog, model, ACME)
    assert asked == [], "neither what is foreign nor what is not there is asked for, so both take the same time"


def test_a_publish_and_an_alias_move_count_at_the_next_request(catalog: Catalog, store: Store, adapters: list[Path]) -> None:
    refusal(catalog, "support", ACME)
    other = Store(store.root)  # as another process has it
    one = other.publish(adapters[0], "acme/support", aliases=["prod"])
    assert digest(catalog, "support", ACME) == digest(catalog, "support@prod", ACME) == one.digest
    two = other.publish(adapters[1], "acme/support")
    assert digest(catalog, "support", ACME) == two.digest and digest(catalog, "support@prod", ACME) == one.digest
    for ref, version in (("acme/support@2", two), ("acme/support@1", one)) * 3:
        other.alias(ref, "prod")
        assert digest(catalog, "support@prod", ACME) == version.digest
    other.remove("acme/support", all=True)
    refusal(catalog, "support", ACME)


def test_while_an_alias_moves_every_answer_is_one_of_the_two(catalog: Catalog, store: Store, adapters: list[Path]) -> None:
    versions = [store.publish(adapters[i], "acme/support", aliases=["prod"]) for i in range(2)]
    stop, seen, troubles = threading.Event(), set[str](), set[str]()

    def look() -> None:
        while not stop.is_set():
            try:
                seen.add(digest(catalog, "support@prod", ACME))
            except TrimtabError as error:
                troubles.add(f"{error}: {error.__cause__!r}")

    threads = [threading.Thread(target=look) for _ in range(3)]
    for t in threads:
        t.start()
    other = Store(store.root)
    for i in range(60):
        other.alias(f"acme/support@{1 + i % 2}", "prod")
    stop.set()
    for t in threads:
        t.join()
    assert troubles == set() and seen == {v.digest for v in versions}


def test_what_was_found_stays_what_it_was(catalog: Catalog, store: Store, adapters: list[Path], base: Base) -> None:
    store.publish(adapters[0], "acme/support")
    found = catalog.find("support", ACME)
    store.publish(adapters[1], "acme/support")
    assert found is not None and same_tensors(found.load(), adapters[0], base)


@pytest.fixture(scope="module")
def one_adapter(base: Base, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    store = Store(tmp_path_factory.mktemp("one") / "store", create=True)
    store.publish(adapters[0], "a/b", aliases=["c"])
    return Catalog(base, store)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.text(alphabet="abc/@1.~*\0\n%", max_size=12) | st.sampled_from(["b" * 10_000, "a/b@" + "c" * 10_000]))
def test_only_the_names_there_are_are_found(one_adapter: Catalog, model: str) -> None:
    assume("*" not in model)  # sums have their own test
    there = {name + selector for name in ("b", "a/b") for selector in ("", "@1", "@c", "@latest")}
    tenant = Tenant("t", "t", ("a",))
    if model in there:
        assert one_adapter.find(model, tenant) is not None
    else:
        with pytest.raises(NotFoundError) as caught:
            one_adapter.find(model, tenant)
        assert len(str(caught.value)) < 2000


def test_hostile_names_with_a_store(catalog: Catalog, store: Store, adapters: list[Path]) -> None:
    store.publish(adapters[0], "acme/support")
    for model in (
        "acme/../acme/support",
        "acme//support",
        "acme/support@",
        "acme/support@@1",
        "@1",
        "/",
        "acme/",
        "/support",
        "acme/support@01",
        "acme/support@-1",
        "acme/support@1/2",
        "ACME/support",
        "acme/support\n",
        "*/support",
        "acme/*",
        "acme/support@sha256:zz",
        "acme/support" + "\0",
        "%61cme/support",
        "acme/" + "x" * 100_000,
    ):
        for tenant in (ACME, LOCAL):
            with pytest.raises(NotFoundError) as caught:
                catalog.find(model, tenant)
            assert len(str(caught.value)) < 600


def test_models_lists_what_can_be_asked_for_and_no_more(
    catalog: Catalog, store: Store, adapters: list[Path], base: Base, tmp_path: Path
) -> None:
    store.publish(adapters[0], "acme/support")
    newest = store.publish(adapters[1], "acme/support")
    store.publish(adapters[0], "law/contracts")
    store.publish(adapters[2], "shared/tone")
    stranger = tiny_base("llama", seed=3, fingerprint="sha256:another")
    store.publish(stirred(stranger, LORA).save(tmp_path / "stranger"), "acme/stranger")
    rows = {m.id: m for m in catalog.models(ACME)}
    assert set(rows) == {base.name, "assistant", "acme/support", "shared/tone"}
    assert rows[base.name].parent is None and rows["assistant"].root == base.name
    support = rows["acme/support"]
    assert (support.root, support.digest, support.parent) == (
        "acme/support@2",
        newest.digest,
        base.name,
    ) and support.created > 1_600_000_000
    for model, row in rows.items():
        found = catalog.find(model, ACME)
        assert (found.digest if found else "") == row.digest
    assert {"law/contracts", "acme/support", "shared/tone"} <= {m.id for m in catalog.models(LOCAL)}
    found = catalog.find("acme/stranger", ACME)
    assert found is not None
    with pytest.raises(AdapterError, match="does not fit this base"):
        found.load()


def test_models_go_on_behind_any_of_them(base: Base, store: Store, adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind one that is gone; and no more is read than what is asked for."""
    for path in ("acme/b", "acme-x/a", "acme/a", "law/z", "shared/c"):
        store.publish(adapters[0], path)
    catalog = Catalog(base, store, base_names=(base.name, "hub/base"))
    for name in ("one", "two"):
        catalog.put(name, FolderAdapter.read(adapters[0].parent, (adapters[0].name,), base), Tenant("acme", "acme", ("acme", "shared")))
    ids = [m.id for m in catalog.models(ACME)]
    assert ids == [base.name, "hub/base", "one", "two", "acme/a", "acme/b", "shared/c"]
    for i, after in enumerate(ids):
        assert [m.id for m in catalog.models(ACME, after)] == ids[i + 1 :]
    assert [m.id for m in catalog.models(ACME, "oz")] == ids[3:] and [m.id for m in catalog.models(ACME, "acme/aa")] == ids[5:]
    assert [m.id for m in catalog.models(LOCAL)][2:] == ["acme-x/a", "acme/a", "acme/b", "law/z", "shared/c"]
    asked: list[int] = []
    real = Store.version
    monkeypatch.setattr(Store, "version", lambda self, name, number: (asked.append(number), real(self, name, number))[1])
    found = catalog.models(LOCAL, "hub/base")
    assert [next(found).id for _ in range(2)] == ["acme-x/a", "acme/a"] and len(asked) == 2


def test_a_damaged_adapter_is_left_out_and_hides_no_other(catalog: Catalog, store: Store, adapters: list[Path]) -> None:
    bad, good = store.publish(adapters[0], "acme/bad"), store.publish(adapters[1], "acme/good")
    blob = store.blob_path(bad.digest)
    blob.chmod(0o644)
    blob.write_bytes(b"{}")
    fresh = Catalog(catalog.base, Store(store.root))
    assert [m.id for m in fresh.models(ACME) if m.parent] == ["acme/good"]
    assert digest(fresh, "good", ACME) == good.digest
    with pytest.raises(StoreTrouble):
        fresh.find("bad", ACME)


def test_a_broken_store_is_our_trouble_not_an_unknown_name(catalog: Catalog, store: Store, adapters: list[Path]) -> None:
    store.publish(adapters[0], "acme/support")
    (store.root / "index.json").write_text("{")
    for ask in (lambda: catalog.find("support", ACME), lambda: list(catalog.models(ACME)), lambda: catalog.find("support", LOCAL)):
        with pytest.raises(StoreTrouble) as caught:
            ask()
        assert caught.value.http_status == 503 and str(store.root) not in str(caught.value)
    shutil.rmtree(store.root)
    with pytest.raises(StoreTrouble):
        catalog.find("support", ACME)
    assert catalog.find("assistant", ACME) is None, "the base is served all the same"


# ---- folders ----


@pytest.fixture
def root(tmp_path: Path, adapters: list[Path]) -> Path:
    root = tmp_path / "root"
    for i, name in enumerate(("acme/one", "acme/two", "law/three")):
        shutil.copytree(adapters[i], root / name)
    return root


@pytest.fixture
def loading(base: Base, store: Store, root: Path) -> Catalog:
    evicted: list[str] = []
    catalog = Catalog(base, store, folders=[root], evict=evicted.append)
    catalog.evicted = evicted  # type: ignore[attr-defined]
    return catalog


def test_without_a_folder_nothing_is_loaded(catalog: Catalog, root: Path) -> None:
    with pytest.raises(AdapterError, match="--adapters-from"):
        catalog.load("mine", root / "acme/one", ACME)


def test_a_folder_that_is_not_there_is_no_folder_to_load_from(base: Base, tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="is no folder"):
        Catalog(base, None, folders=[tmp_path / "absent"])


def test_what_a_tenant_has_loaded_is_its_alone(loading: Catalog, root: Path, adapters: list[Path], base: Base) -> None:
    loading.load("mine", str(root / "acme/one"), ACME)
    found = loading.find("mine", ACME)
    assert found is not None and same_tensors(found.load(), adapters[0], base) and found.ref == str(root / "acme/one")
    row = next(m for m in loading.models(ACME) if m.id == "mine")
    assert row.digest == found.digest and row.root == found.ref and row.parent == base.name
    for other in (LAW, LOCAL):
        assert refusal(loading, "mine", other) == refusal(loading, "nothing", other)
        assert "mine" not in {m.id for m in loading.models(other)}
        with pytest.raises(NotFoundError):
            loading.unload("mine", other)
    loading.load("mine", root / "law/three", LAW)
    assert digest(loading, "mine", LAW) != digest(loading, "mine", ACME)


def test_a_version_of_the_store_can_be_given_a_name(loading: Catalog, store: Store, adapters: list[Path]) -> None:
    for i, path in enumerate(("acme/support", "law/support")):
        store.publish(adapters[i], path)
    name = "acme/support"
    loading.load("Mine_V1", name, ACME)
    assert digest(loading, "Mine_V1", ACME) == digest(loading, name, ACME)
    with pytest.raises(NotFoundError):
        loading.load("other", "law/support", ACME)
    found = loading.find(name, ACME)
    assert found is not None
    assert loading.created(name, found, ACME) == next(m.created for m in loading.models(ACME) if m.id == name) > 0


def test_unloading_is_at_once_and_frees_what_nobody_has(loading: Catalog, root: Path) -> None:
    evicted: list[str] = loading.evicted  # type: ignore[attr-defined]
    loading.load("one", root / "acme/one", ACME)
    loading.load("again", root / "acme/one", ACME)
    same = digest(loading, "one", ACME)
    assert digest(loading, "again", ACME) == same
    loading.unload("one", ACME)
    refusal(loading, "one", ACME)
    assert evicted == [] and digest(loading, "again", ACME) == same
    loading.unload("again", ACME)
    assert evicted == [same]
    with pytest.raises(NotFoundError):
        loading.unload("again", ACME)


def test_only_what_lies_below_the_folder_and_is_the_tenants_is_loaded(
    loading: Catalog, root: Path, adapters: list[Path], tmp_path: Path
) -> None:
    (root / "acme/link-in").symlink_to(root / "acme/one")
    (root / "acme/link-law").symlink_to(root / "law/three")
    (root / "acme/link-out").symlink_to(adapters[3])
    (root / "acme/up").symlink_to("..")
    (root / "acme/file").write_text("x")
    outside = tmp_path / "root-beside"
    shutil.copytree(adapters[3], outside)
    refused = [
        adapters[3],
        outside,
        root / "acme/link-out",
        root / "acme/link-law",
        root / "acme/up/law/three",
        root / "acme/../law/three",
        root / "law/three",
        root / "acme",
        root,
        root / "acme/../..",
        root / "acme/absent",
        root / "acme/file",
        "acme/one",
        "",
        "/",
        "~/x",
        str(root / "acme/one") + "\0",
        "/" * 5000,
    ]
    said = set()
    for path in refused:
        with pytest.raises(NotFoundError) as caught:
            loading.load("mine", path, ACME)
        said.add(str(caught.value).replace(repr(str(path)[:256]), "<path>"))
    assert len(said) == 1, "what is elsewhere is not told from what is not there"
    loading.load("linked", root / "acme/link-in", ACME)
    loading.load("three", root / "law/three", LOCAL)


def test_a_folder_swapped_for_a_link_after_the_look_is_not_followed(loading: Catalog, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.serve import catalog as module

    real = module.below

    def swap(*arguments):  # type: ignore[no-untyped-def]
        found = real(*arguments)
        shutil.rmtree(root / "acme/one")
        (root / "acme/one").symlink_to(root / "law/three")
        return found

    monkeypatch.setattr(module, "below", swap)
    with pytest.raises(AdapterError, match="is refused"):
        loading.load("mine", root / "acme/one", ACME)
    refusal(loading, "mine", ACME)


def test_names_that_are_taken_or_none(loading: Catalog, store: Store, root: Path, adapters: list[Path]) -> None:
    store.publish(adapters[3], "acme/support")
    loading.load("mine", root / "acme/one", ACME)
    for name, words in (
        ("mine", "already"),
        ("support", "already"),
        (loading.base.name, "already"),
        ("a/b/c", "no name"),
        ("/b", "no name"),
        ("", "no name"),
        ("X y", "no name"),
    ):
        with pytest.raises(AdapterError, match=words):
            loading.load(name, root / "acme/two", ACME)
    loading.load("contracts", root / "acme/two", ACME)


def test_a_name_given_at_the_start_goes_before_a_short_name_of_the_store(
    loading: Catalog, store: Store, root: Path, adapters: list[Path], base: Base
) -> None:
    """`trimtab serve --local --adapter support=FOLDER` beside a store that has acme/support."""
    stored = store.publish(adapters[3], "acme/support")
    named = FolderAdapter.read(adapters[1].resolve().parent, (adapters[1].name,), base)
    loading.put("support", named, LOCAL)
    assert loading.find("support", LOCAL) is named
    assert digest(loading, "acme/support", LOCAL) == digest(loading, "support@1", LOCAL) == stored.digest != named.digest
    with pytest.raises(AdapterError, match="already: acme/support@1 of the store"):
        loading.put("acme/support", named, LOCAL)
    with pytest.raises(AdapterError, match="already: acme/support@1 of the store"):
        loading.load("support", root / "acme/one", ACME)


def test_a_bad_folder_is_refused_at_loading(loading: Catalog, root: Path) -> None:
    (root / "acme/one" / WEIGHTS).write_bytes(b"xx")
    (root / "acme/two" / "adapter_config.json").unlink()
    os.mkfifo(root / "acme/two" / "adapter_config.json")
    for name in ("one", "two"):
        with pytest.raises(AdapterError, match="is refused"):
            loading.load(name, root / "acme" / name, ACME)
        refusal(loading, name, ACME)


def test_a_huge_file_is_refused_before_it_is_hashed(loading: Catalog, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound header of one tensor of a terabyte, whose bytes take no room."""
    size = 2**40
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    write_tensors(root / "acme/one" / WEIGHTS, {name: {"dtype": "F32", "shape": [4, size // 16], "data_offsets": [0, size]}})
    os.truncate(root / "acme/one" / WEIGHTS, (root / "acme/one" / WEIGHTS).stat().st_size + size)
    (root / "acme/one" / "trimtab.json").unlink(missing_ok=True)
    monkeypatch.setattr(served, "_hash", lambda *a: pytest.fail("it is hashed"))
    with pytest.raises(AdapterError, match=r"lora_B\.weight is missing"):
        loading.load("one", root / "acme/one", ACME)


def test_a_folder_that_changes_after_loading_is_refused_not_served(loading: Catalog, root: Path, adapters: list[Path]) -> None:
    loading.load("mine", root / "acme/one", ACME)
    found = loading.find("mine", ACME)
    assert found is not None
    shutil.copy(adapters[3] / WEIGHTS, root / "acme/one" / WEIGHTS)
    (root / "acme/one" / "trimtab.json").unlink()  # else its own digests would give it away
    with pytest.raises(AdapterError, match="has changed since"):
        found.load()
    shutil.rmtree(root / "acme/one")
    with pytest.raises(AdapterError, match="cannot be read any more"):
        found.load()


def test_the_digest_is_of_what_is_loaded_and_nothing_else(loading: Catalog, root: Path) -> None:
    for name in ("a", "b"):
        loading.load(name, root / "acme/one", ACME)
        (root / "acme/one/README.md").write_text(f"another text {name}")
    shutil.copytree(root / "acme/one", root / "acme/copy")
    loading.load("c", root / "acme/copy", ACME)
    loading.load("d", root / "acme/two", ACME)
    digests = [digest(loading, name, ACME) for name in "abcd"]
    assert len(set(digests[:3])) == 1 and len(set(digests)) == 2 and digests[0].startswith("sha256:")


# ---- in memory ----


def test_a_snapshot_is_served_and_the_next_one_takes_its_name(base: Base) -> None:
    evicted: list[str] = []
    catalog = Catalog(base, None, evict=evicted.append)
    adapter = stirred(base, LORA)
    first = snapshot("run/lora", base, adapter.method, adapter.params)
    assert snapshot("run/lora", base, adapter.method, adapter.params).digest == first.digest
    catalog.put("lora", first, LOCAL)
    before = {k: t.clone() for k, t in adapter.params.items()}
    key = next(iter(adapter.params))
    with torch.no_grad():
        adapter.params[key].view(-1)[0] += 1  # a step
    served = catalog.find("lora", LOCAL)
    assert served is first and all(torch.equal(served.load().params[k], t) for k, t in before.items()), "the step did not change it"
    second = snapshot("run/lora", base, adapter.method, adapter.params)
    assert second.digest != first.digest
    catalog.replace("lora", second, LOCAL)
    assert catalog.find("lora", LOCAL) is second and evicted == [first.digest]
    with pytest.raises(NotFoundError):
        catalog.replace("other", second, LOCAL)
    with pytest.raises(AdapterError, match="already"):
        catalog.put("lora", second, LOCAL)


@pytest.mark.parametrize("method", [cls.examples()[0] for cls in METHODS.values()], ids=lambda m: type(m).__name__)
def test_a_snapshot_computes_what_the_saved_adapter_computes(base: Base, method, tmp_path: Path) -> None:
    adapter = stirred(base, method)
    saved = Adapter.load(adapter.save(tmp_path / "a"), base)
    live = snapshot("x", base, adapter.method, adapter.params).load()
    a, b = base.logits([[1, 2, 3]], [saved])[0], base.logits([[1, 2, 3]], [live])[0]
    assert torch.equal(a, b)


def test_a_base_has_its_own_name_or_the_names_it_is_given(base: Base):
    """A base that was opened from a folder is named by the folder's path, which is nothing for clients."""
    assert Catalog(base, None).base_names == (base.name,)
    shown = Catalog(base, None, base_names=("shown",))
    assert shown.base_names == ("shown",) and shown.find("shown", LOCAL) is None
    with pytest.raises(NotFoundError):
        shown.find(base.name, LOCAL)


def test_a_version_of_the_store_stays_when_its_second_name_goes(loading: Catalog, store: Store, adapters: list[Path]) -> None:
    """Others ask for it by its own name; nobody may put it out of memory by loading and unloading it."""
    store.publish(adapters[0], "acme/support")
    loading.load("mine", "acme/support", ACME)
    assert digest(loading, "mine", ACME) == digest(loading, "support", ACME)
    loading.unload("mine", ACME)
    assert loading.evicted == []  # type: ignore[attr-defined]


def test_a_path_that_no_folder_can_have_is_below_none(tmp_path: Path):
    (tmp_path / "ring").symlink_to("ring")
    for name in ("a" * 300, "a/" * 1900, "ring", "ring/x", "a\0b", "\udcff"):
        assert below([tmp_path], f"{tmp_path}/{name}", None) is None, name[:10]


def test_a_head_is_told_without_the_weights(base: Base, store: Store, catalog: Catalog):
    store.publish(headed(base, LORA, Head(("good", "bad"))), "acme/judge")
    store.publish(stirred(base, LORA), "acme/plain")
    found = catalog.find("acme/judge", ACME)
    assert found is not None and found.head == Head(("good", "bad"))
    assert [getattr(catalog.find(name, ACME), "head", "") for name in ("acme/plain", "0.5*acme/plain")] == [None, None]
