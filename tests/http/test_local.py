"""Local mode: no keys, but only for clients that mean this machine by name."""

import asyncio
import inspect

import pytest

from tests.http.common import TEXT, Caller, call, error_of, site
from trimtab.http.assemble import Asked
from trimtab.http.server import local_hosts


@pytest.fixture(scope="module")
def local():
    with site(Asked(hosts=local_hosts(8000))) as s:
        yield s
        s.idle()


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "LOCALHOST:8000"])
@pytest.mark.parametrize("path", ["/v1/models", "/livez", "/metrics"])
def test_this_machine_is_answered_without_a_key(local, host: str, path: str):
    assert call(local.app, "GET", path, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1", "localhost", "127.0.0.1:80", "127.0.0.1:8001", "127.0.0.1.evil.example:8000",
     "localhost:8000.evil.example", "127.0.0.1:8000@evil.example", "0.0.0.0:8000", "127.1:8000", ""],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/livez", "/nothing", "/openapi.json"])
def test_another_name_is_refused_whatever_it_asks_for(local, host: str, path: str):
    """A page at evil.example whose name is made to point at 127.0.0.1 sends its own name."""
    r = call(local.app, "GET", path, headers={"host": host})
    assert error_of(r, 403)["code"] == "wrong_host"


def test_no_host_at_all_and_two_hosts_are_refused(local):
    for hosts in ([], [b"evil.example", b"evil.example"]):
        c = Caller(local.app, "/v1/completions", TEXT)
        c.scope["headers"] = [h for h in c.scope["headers"] if h[0] != b"host"] + [(b"host", h) for h in hosts]
        asyncio.run(c.run())
        assert c.status == 403
    for order in ([b"localhost:8000", b"evil.example"], [b"evil.example", b"localhost:8000"]):
        c = Caller(local.app, "/v1/completions", TEXT)
        c.scope["headers"] = [h for h in c.scope["headers"] if h[0] != b"host"] + [(b"host", h) for h in order]
        asyncio.run(c.run())
        assert c.status == 403, order


def test_local_mode_has_no_admin_routes(local):
    for path in ("/admin/tenants", "/admin/usage"):
        assert error_of(call(local.app, "GET", path, headers={"host": "localhost:8000"}), 404)["code"] == "unknown_route"


def test_port_80_may_be_left_out():
    assert {"localhost", "localhost:80"} <= local_hosts(80) and "localhost" not in local_hosts(8000)


def test_no_page_of_another_site_may_read_answers(local):
    """Without CORS headers a browser gives no answer to a page of another origin, and sends it no JSON for that page."""
    asked = {"host": "localhost:8000", "origin": "http://evil.example", "access-control-request-method": "POST"}
    r = call(local.app, "OPTIONS", "/v1/completions", headers=asked)
    assert r.status_code == 204 and not any(h.startswith("access-control") for h in r.headers)


def test_a_gate_stands_before_all_routes():
    from trimtab.http import app

    source = inspect.getsource(app.create_app)
    assert source.index("Gate") < source.index("RequestLog"), "the log is outermost: refusals have ids too"
