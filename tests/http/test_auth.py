"""Who may do what: every route denies by default, a wrong key is a 401, a foreign adapter does not exist, admin routes need an admin."""

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts

from tests.http.common import TEXT, Caller, Site, base_of, call, error_of, post, site
from tests.store.common import stirred
from trimtab.http.assemble import Asked
from trimtab.http.auth import admin_caller, caller
from trimtab.http.limits import Gate
from trimtab.http.logs import JsonLines
from trimtab.methods import LoraConfig
from trimtab.serve.audit import Audit, audit_path
from trimtab.serve.tenants import Tenants
from trimtab.store.registry import Store

PUBLIC = {"/", "/page/{name}", "/studio/about", "/docs", "/livez", "/readyz", "/health", "/ping", "/version", "/openapi.json"}
"""Paths that need no key. They tell nothing of tenants, models or load."""


@dataclass
class Town:
    site: Site
    tenants: Tenants
    keys: dict[str, str]
    audit: Audit

    def get(self, path: str, who: str = "", method: str = "GET", body=None):
        return call(self.site.app, method, path, body, headers=self.headers(who))

    def headers(self, who: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[who]}"} if who else {}

    def ask(self, who: str, model: str, **more):
        return post(self.site.app, "/v1/completions", TEXT | {"model": model} | more, **self.headers(who))


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """acme and bolt with a store, an admin, and a tenant with tight limits."""
    folder = tmp_path_factory.mktemp("town")
    base = base_of()
    store = Store(folder / "store", create=True)
    for seed, name in enumerate(("acme/support", "acme/support", "bolt/billing"), start=1):
        store.publish(stirred(base, LoraConfig(r=4), seed=seed), name, aliases=["prod"] if seed == 1 else [])
    with Tenants(folder / "tenants.db", create=True) as tenants, Audit(audit_path(folder / "tenants.db")) as audit:
        tenants.add("acme")
        tenants.add("bolt")
        tenants.add("root", admin=True)
        tenants.add("tight", namespaces=["acme"], max_concurrent=2)
        tenants.add("poor", namespaces=["acme"], tokens_per_minute=1)
        keys = {n: tenants.create_key(n)[1] for n in ("acme", "bolt", "root", "tight", "poor")}
        with site(Asked(store=store, tenants=tenants, audit=audit), base=base) as s:
            yield Town(s, tenants, keys, audit)
            s.idle()


def calls_of(dependant: Dependant) -> set[object]:
    return {dependant.call} | {c for d in dependant.dependencies for c in calls_of(d)}


def test_every_route_depends_on_a_key(town: Town):
    seen = set()
    for context in iter_route_contexts(town.site.app.routes):
        path = context.path or ""
        seen.add(path)
        if path in PUBLIC:
            continue
        calls = calls_of(context.dependant)
        assert caller in calls, f"{path} asks for no key"
        assert (admin_caller in calls) == (path.startswith("/admin") or path in ("/metrics", "/studio/alias")), path
    assert {"/v1/chat/completions", "/v1/models/{model:path}", "/metrics", "/admin/usage", "/v1/load_lora_adapter"} <= seen
    assert seen & PUBLIC == PUBLIC


ROUTES = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/metrics"),
    ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"), ("GET", "/admin/tenants"), ("POST", "/admin/tenants"),
    ("GET", "/admin/usage"), ("DELETE", "/admin/keys/abc"),
]  # fmt: skip


WRONG = [
    "", "Bearer", "Bearer ", "Bearer nonsense", "Bearer a.b", "Basic YTpi", "Bearer {id}.wrong", "Bearer {id}", "bearer \u00e9.\u00e9",
    "Bearer " + "x" * 9000,
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("given", WRONG)
def test_a_wrong_key_is_a_401(town: Town, method: str, path: str, given: str):
    key = given.replace("{id}", town.keys["acme"].partition(".")[0])
    r = call(town.site.app, method, path, headers={"authorization": key.encode("latin-1")} if given else None)
    error = error_of(r, 401)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert r.headers["www-authenticate"] == "Bearer"


def test_a_key_is_checked_before_the_body_is_read(town: Town):
    c = Caller(town.site.app, "/v1/completions", TEXT)
    asyncio.run(c.run())
    assert c.status == 401 and not c.was_read


def test_public_routes_need_no_key(town: Town):
    for path in PUBLIC:
        assert town.get(path.format(name="page.js")).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/admin/tenants", "/admin/usage", "/admin/tenants/acme"])
def test_admin_routes_need_an_admin(town: Town, path: str):
    assert error_of(town.get(path, "acme"), 403)["type"] == "permission_error"
    assert town.get(path, "root").status_code == 200


def test_a_foreign_adapter_is_answered_as_one_that_does_not_exist(town: Town):
    assert town.ask("acme", "acme/support").status_code == 200
    assert town.ask("bolt", "bolt/billing").status_code == 200
    same = []
    for who, model in (("bolt", "acme/support"), ("bolt", "acme/nothing"), ("bolt", "nobody/support"), ("acme", "acme/support@9")):
        r = town.ask(who, model)
        same.append(error_of(r, 404) | {"message": r.json()["error"]["message"].replace(model, "X")})
        listed = town.get(f"/v1/models/{model}", who)
        assert error_of(listed, 404) == r.json()["error"]
    assert all(e == same[0] for e in same), same


def test_names_go_through_a_tenants_namespaces(town: Town):
    short, full = town.ask("acme", "support"), town.ask("acme", "acme/support@2")
    assert short.json()["choices"] == full.json()["choices"]
    assert short.headers["x-trimtab-adapter"] == full.headers["x-trimtab-adapter"]
    assert short.headers["x-trimtab-adapter"].startswith("acme/support@2 sha256:")
    assert town.ask("acme", "support@prod").headers["x-trimtab-adapter"].startswith("acme/support@1 ")
    assert [m["id"] for m in town.get("/v1/models", "bolt").json()["data"]] == ["tiny", "bolt/billing"]


def test_each_part_of_a_composition_must_be_the_tenants_own(town: Town):
    """A sum with another tenant's adapter is answered as one with an adapter that does not exist; usage is of its parts, at any scale."""
    foreign, unknown = (town.ask("bolt", f"bolt/billing+0.5*{name}") for name in ("acme/support", "acme/nothere"))
    assert error_of(foreign, 404)["message"].replace("acme/support", "acme/nothere") == error_of(unknown, 404)["message"]
    listed = town.ask("bolt", "tiny", adapters=[{"name": "bolt/billing"}, {"name": "acme/support"}])
    assert error_of(listed, 404)["message"] == error_of(foreign, 404)["message"]
    r = town.ask("acme", "support@1+0.5*acme/support@2")
    ref, digest = r.headers["x-trimtab-adapter"].split()
    assert sorted(ref.split("+")) == ["0.5*acme/support@2", "acme/support@1"]
    again = town.ask("acme", "-0.25*acme/support@2+support@1")
    used = {row["adapter"]: row for row in town.get("/admin/usage?tenant=acme", "root").json()}
    mine = used["+".join(sorted(part.partition("*")[2] for part in digest.split("+")))]
    assert mine["requests"] == 2 and mine["completion_tokens"] == sum(x.json()["usage"]["completion_tokens"] for x in (r, again))


def test_a_tenants_limits_are_429_with_a_time_to_wait(town: Town):
    r = town.ask("tight", "tiny", n=2)
    assert r.status_code == 200
    error = error_of(town.ask("tight", "tiny", n=3), 400)
    assert "n = 3" in error["message"]

    async def two_at_once() -> list[Caller]:
        body = TEXT | {"max_tokens": 100_000, "ignore_eos": True}
        callers = [Caller(town.site.app, "/v1/completions", body, town.headers("tight")) for _ in range(3)]
        tasks = [c.start() for c in callers]
        while not any(c.status for c in callers):
            await asyncio.sleep(0.001)
        for c in callers:
            c.leave()
        await asyncio.gather(*tasks)
        await town.site.settled()
        return callers

    callers = asyncio.run(two_at_once())
    assert sorted(str(c.status) for c in callers) == ["429", "499", "499"]
    refused = next(c for c in callers if c.status == 429)
    assert int(dict(refused.sent[0]["headers"])[b"retry-after"]) >= 1
    assert json.loads(refused.body)["error"]["code"] == "rate_limit_exceeded"


def test_tokens_a_minute_are_counted(town: Town):
    assert town.ask("poor", "tiny").status_code == 200
    r = town.ask("poor", "tiny")
    assert error_of(r, 429)["type"] == "rate_limit_error" and int(r.headers["retry-after"]) > 1


def test_usage_is_kept_by_tenant_and_adapter(town: Town):
    before = {r["adapter"]: r for r in town.get("/admin/usage?tenant=bolt", "root").json()}
    digest = town.ask("bolt", "bolt/billing", n=2, prompt=["hello", "you"]).headers["x-trimtab-adapter"].split()[1]
    after = {r["adapter"]: r for r in town.get("/admin/usage?tenant=bolt", "root").json()}
    old = before.get(digest, {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0})
    assert after[digest]["requests"] - old["requests"] == 4
    assert after[digest]["prompt_tokens"] - old["prompt_tokens"] == len("hello" + "you")
    assert after[digest]["completion_tokens"] - old["completion_tokens"] == 4 * 6
    assert error_of(town.get("/admin/usage?since=yesterday", "root"), 400)["param"] == "since"


def test_what_a_client_had_before_it_left_is_counted(town: Town):
    def used() -> tuple[int, int]:
        rows = town.tenants.usage.report("bolt")
        return sum(r.requests for r in rows), sum(r.completion_tokens for r in rows)

    async def go() -> None:
        body = TEXT | {"stream": True, "max_tokens": 100_000, "ignore_eos": True}
        c = Caller(town.site.app, "/v1/completions", body, town.headers("bolt"))
        task = c.start()
        async with asyncio.timeout(20):
            while len(c.sent) < 4:
                await asyncio.sleep(0.001)
        c.leave()
        await asyncio.wait_for(task, 20)
        await town.site.settled()

    requests, tokens = used()
    asyncio.run(go())
    assert used()[0] == requests + 1 and used()[1] > tokens


def test_the_life_of_a_tenant_and_its_keys(town: Town):
    made = town.get("/admin/tenants", "root", "POST", {"name": "newco", "tokens_per_minute": 1000, "weight": 2})
    assert made.status_code == 201 and made.json()["namespaces"] == ["newco"] and made.json()["weight"] == 2.0
    assert "already" in error_of(town.get("/admin/tenants", "root", "POST", {"name": "newco"}), 400)["message"]
    assert error_of(town.get("/admin/tenants", "root", "POST", {"name": "x", "wieght": 1}), 400)["param"] == "wieght"
    key = town.get("/admin/tenants/newco/keys", "root", "POST", {"lifetime": 3600}).json()
    town.keys["newco"] = key["key"]
    assert town.get("/v1/models", "newco").status_code == 200
    changed = town.get("/admin/tenants/newco", "root", "PATCH", {"namespaces": ["acme"], "tokens_per_minute": None}).json()
    assert changed["namespaces"] == ["acme"] and changed["tokens_per_minute"] is None and changed["weight"] == 2.0
    assert town.ask("newco", "acme/support").status_code == 200, "from the next request on"
    turned = town.get(f"/admin/keys/{key['id']}/rotate", "root", "POST", {"grace": 0}).json()
    error_of(town.get("/v1/models", "newco"), 401)
    town.keys["newco"] = turned["key"]
    assert town.get("/v1/models", "newco").status_code == 200
    listed = town.get("/admin/tenants/newco/keys", "root").json()
    assert [k["id"] for k in listed] == [key["id"], turned["id"]] and all(k["key"] is None for k in listed)
    assert town.get(f"/admin/keys/{turned['id']}", "root", "DELETE").json()["revoked"] is not None
    error_of(town.get("/v1/models", "newco"), 401)
    assert town.get("/admin/tenants/newco", "root", "DELETE").status_code == 200
    error_of(town.get("/admin/tenants/newco", "root"), 404)
    error_of(town.get("/admin/tenants/newco", "root", "DELETE"), 404)
    lines = [json.loads(line) for line in town.audit.path.read_text().splitlines()]
    acts = [(x["event"], x["target"], x["stage"]) for x in lines if x.get("actor") == "tenant:root"]
    assert ("tenant.add", "newco", "done") in acts and ("key.create", "newco", "done") in acts
    assert ("key.revoke", turned["id"], "done") in acts and ("tenant.remove", "newco", "failed") in acts
    assert key["key"] not in town.audit.path.read_text() and turned["key"].partition(".")[2] not in town.audit.path.read_text()


def test_refusals_are_audited_and_counted(town: Town):
    town.get("/v1/models")
    town.get("/admin/tenants", "bolt")
    town.audit.flush()
    refused = [x for x in map(json.loads, town.audit.path.read_text().splitlines()) if x["event"] == "refused"]
    assert any(x["reason"] == "auth" for x in refused) and any(x["reason"] == "forbidden" and x["tenant"] == "bolt" for x in refused)
    text = town.get("/metrics", "root").text
    for reason in ("auth", "forbidden", "not_found", "invalid"):
        line = next(x for x in text.splitlines() if "requests_rejected_total" in x and f'reason="{reason}"' in x)
        assert float(line.rpartition(" ")[2]) >= 1, line


def test_the_log_has_ids_and_numbers_but_no_prompts_and_no_keys(town: Town, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "trimtab.http"):
        r = town.ask("acme", "acme/support", prompt="a very private prompt")
        town.get(f"/admin/keys/{town.keys['acme']}", "root", "DELETE")
        town.ask("acme", "acme/support", prompt="a very private prompt", temperature=-1)
        town.get("/livez")
    lines = [json.loads(JsonLines().format(x)) for x in caplog.records if x.name == "trimtab.http"]
    assert len(lines) == 3, "health checks that succeed are not logged"
    done, _, wrong = lines
    assert done["id"] == r.headers["x-request-id"] and done["tenant"] == "acme" and done["model"] == "acme/support"
    assert (done["status"], done["choices"], done["prompt_tokens"], done["completion_tokens"]) == (200, 1, 21, 6)
    assert done["adapter"] == "acme/support@2" and done["finish"] == "length" and 0 < done["first_token_s"] <= done["seconds"]
    assert wrong["status"] == 400 and wrong["error"] == "invalid_value"
    text = json.dumps(lines)
    assert "private" not in text
    assert all(key.partition(".")[2] not in text for key in town.keys.values())


def test_a_key_given_as_a_name_or_an_id_reaches_no_log(town: Town, caplog: pytest.LogCaptureFixture):
    key = town.keys["acme"]
    secret = key.partition(".")[2]
    with caplog.at_level(logging.INFO, "trimtab.http"):
        r = town.ask("acme", key)
        assert error_of(r, 404)["code"] == "model_not_found" and secret not in r.text
        r = post(town.site.app, "/v1/completions", TEXT | {"model": "no/such"}, **town.headers("acme"), **{"x-request-id": key})
        assert r.status_code == 404 and secret not in r.headers["x-request-id"]
        assert town.get(f"/v1/models/{key}", "acme").status_code == 404
        post(town.site.app, f"/{key}", TEXT, **{"x-request-id": key})
        logging.getLogger("trimtab.http").error("trouble with %s", key, extra={"told": {"deep": [{"er": key}]}})
        town.site.services.audit.refused("auth", tenant=key, route=key, request_id=key, client=key)
    town.audit.flush()
    text = "".join(JsonLines().format(x) for x in caplog.records) + town.audit.path.read_text() + town.get("/metrics", "root").text
    assert "(key)" in text and secret[:20] not in text


def test_no_spelling_of_a_key_reaches_a_log_or_an_answer(town: Town, caplog: pytest.LogCaptureFixture):
    key_id, _, secret = town.keys["acme"].partition(".")
    encoded = "".join(f"%{ord(c):02x}" for c in f"{key_id}.{secret}")
    answers = []
    with caplog.at_level(logging.INFO, "trimtab.http"):
        for said in (secret, f"{key_id}:{secret}", f"{key_id} . {secret}", f"{key_id}%252e{secret}", encoded, f'"%22{encoded}'):
            answers.append(town.ask("acme", said))
            answers.append(town.get(f"/v1/models/{said}", "acme"))
            answers.append(town.ask("acme", "acme/support", **{said: 1}))
            answers.append(town.ask("acme", "acme/support", stream_options={said: 1}))
            answers.append(town.ask("acme", "acme/support", stream_options={"x" * 10 + "." * 30 + said: 1}))
            logging.getLogger("trimtab.http").error("trouble with %s", said, extra={"told": {said: [said, {said}]}})
            town.site.services.audit.refused("auth", tenant=said, route=said, request_id=said, client=said)
        answers.append(post(town.site.app, "/v1/completions", TEXT, **town.headers("acme"), **{"x-request-id": secret}))
        answers.append(post(town.site.app, "/v1/completions", TEXT, **town.headers("acme"), **{"x-request-id": f"req-{secret}"}))
    town.audit.flush()
    lines = [JsonLines().format(x) for x in caplog.records if x.name == "trimtab.http"] + town.audit.path.read_text().splitlines()
    assert len(lines) > 50 and all(json.loads(line) for line in lines)
    told = "\n".join(lines + [f"{r.text} {r.headers}" for r in answers])
    for _ in range(4):
        assert secret[:16] not in told
        told = unquote(told)


@pytest.fixture(autouse=True)
def keys_stay(town: Town) -> Iterator[None]:
    """The log's test gives a whole key where an id belongs; that must have revoked nothing."""
    yield
    assert town.get("/v1/models", "acme").status_code == 200


def test_folders_are_loaded_by_their_tenant_alone(tmp_path: Path):
    base = base_of()
    for who in ("acme", "bolt"):
        stirred(base, LoraConfig(r=2), seed=3).save(tmp_path / "drop" / who / "one")
    with Tenants(tmp_path / "t.db", create=True) as tenants:
        for who in ("acme", "bolt"):
            tenants.add(who)
        keys = {n: {"authorization": f"Bearer {tenants.create_key(n)[1]}"} for n in ("acme", "bolt")}
        with site(Asked(tenants=tenants, folders=[tmp_path / "drop"]), base=base) as s:

            def load(who: str, whose: str, name: str = "mine"):
                return post(
                    s.app, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(tmp_path / "drop" / whose / "one")}, **keys[who]
                )

            assert error_of(load("acme", "bolt"), 404)["message"].replace("bolt", "X") == error_of(load("acme", "X"), 404)["message"]
            assert load("acme", "acme").status_code == 200
            assert post(s.app, "/v1/completions", TEXT | {"model": "mine"}, **keys["acme"]).status_code == 200
            error_of(post(s.app, "/v1/completions", TEXT | {"model": "mine"}, **keys["bolt"]), 404)
            error_of(post(s.app, "/v1/unload_lora_adapter", {"lora_name": "mine"}, **keys["bolt"]), 404)


def test_a_full_server_tells_only_those_who_have_a_key(town, monkeypatch):
    """Its refusal comes before the routes, which check keys; so it checks them itself. A tenant's own limit is told first."""
    admission = town.site.services.admission
    held = [admission.admit(town.tenants.authenticate(town.keys["tight"])) for _ in range(2)]
    monkeypatch.setattr(admission, "max_open", 2)
    try:
        assert error_of(town.ask("", "tiny"), 401)["code"] == "invalid_api_key"
        wrong = post(town.site.app, "/v1/completions", TEXT, authorization="Bearer 0123456789ab.nonsense-nonsense")
        assert error_of(wrong, 401)["code"] == "invalid_api_key"
        assert error_of(town.ask("acme", "tiny"), 503)["code"] == "overloaded"
        assert error_of(town.ask("tight", "tiny"), 429)["code"] == "rate_limit_exceeded"
        assert town.get("/v1/models", "acme").status_code == 200
    finally:
        for ticket in held:
            ticket.close()
    assert town.ask("acme", "tiny").status_code == 200


def test_requests_wait_for_their_tenants_turn_before_a_route_sees_them(town: Town):
    """A hundred that come together begin one after the other, and so do those without a key; another tenant's does not wait for them."""
    began: list[str] = []

    async def route(scope, receive, send) -> None:
        began.append(scope["who"])

    async def ask(who: str, key: str, path: str = "/v1/completions") -> None:
        caller = Caller(gate, path, TEXT, {"authorization": f"Bearer {key}"})
        caller.scope["who"] = who
        await caller.start()

    async def all_of_them() -> None:
        keys = [*[("acme", town.keys["acme"])] * 100, *[("nobody", f"no.{i}") for i in range(100)]]
        floods = [asyncio.create_task(ask(*key)) for key in keys]
        for _ in range(2):
            await asyncio.sleep(0)
        assert began == ["acme", "nobody"]
        await ask("bolt", town.keys["bolt"])
        await ask("probe", "", "/livez")
        assert began.count("acme") <= 4 and began.count("nobody") <= 4 and began.count("bolt") == 1
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)

    gate = Gate(route, town.site.services)
    asyncio.run(all_of_them())
    assert town.site.services.life.open == 0
