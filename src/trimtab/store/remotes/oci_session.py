"""How a registry is spoken to: a session with time limits, the credentials that `docker login` left, requests' errors as ours.

`oras` gives the session, reads the credentials and trades them for tokens. Its own transfers are not used: they serialise manifests anew
(which changes their digest), read whole blobs into memory, have no ranges, no bounds and no time limits, compare no digest, and wait two
minutes over a wrong password.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.errors import AdapterError
from trimtab.store.files import Refusal, parse_json
from trimtab.store.remotes.address import RegistryAddress, redacted
from trimtab.store.remotes.fetch import TIMEOUT_S, Transient

MAX_REDIRECTS = 5


def open_provider(address: RegistryAddress) -> Any:
    """oras's session and credentials for one registry, made patient but not endlessly so."""
    try:
        import oras.container  # type: ignore[import-untyped]
        import oras.provider  # type: ignore[import-untyped]
        from requests.adapters import HTTPAdapter
    except ImportError as error:
        raise AdapterError(
            f"{address}: the package {error.name!r} is missing, which speaks to registries", fix="pip install 'trimtab[oci]'"
        ) from error

    class Bounded(HTTPAdapter):
        """Every request has a time limit, those included that oras makes for tokens."""

        def send(
            self, request: Any, stream: bool = False, timeout: Any = None, verify: Any = True, cert: Any = None, proxies: Any = None
        ) -> Any:
            return super().send(request, stream, timeout or TIMEOUT_S, verify, cert, proxies)

    logging.getLogger("oras").setLevel(logging.CRITICAL)  # what it logs as errors, we raise
    provider = oras.provider.Registry(hostname=address.registry, insecure=address.is_local)
    for scheme in ("http://", "https://"):
        provider.session.mount(scheme, Bounded())
    provider.session.max_redirects = MAX_REDIRECTS
    # oras would merge ~/.docker/config.json with $DOCKER_CONFIG's in no fixed order; for docker the one replaces the other
    provider.auth._auth_config = _docker_config(str(address))
    provider.auth.load_configs(oras.container.Container(f"{address.registry}/{address.repository}", registry=address.registry))
    return provider


def _docker_config(where: str) -> dict[str, Any]:
    """What `docker login` has left: credentials, or the programs that keep them."""
    named = os.environ.get("DOCKER_CONFIG")
    path = (Path(named) if named else Path.home() / ".docker") / "config.json"
    try:
        found = parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        found = {}
    except (OSError, Refusal) as error:
        raise AdapterError(f"{where}: {path} cannot be read", fix="mend it, or log in anew with `docker login`") from error
    return {"auths": found.get("auths") or {}, "credsStore": found.get("credsStore"), "credHelpers": found.get("credHelpers") or {}}


@contextmanager
def speaking(where: str) -> Iterator[None]:
    """requests' errors as ours."""
    import requests
    import urllib3

    try:
        yield
    except requests.exceptions.TooManyRedirects as error:
        raise AdapterError(f"{where}: more than {MAX_REDIRECTS} redirects", fix="see whether the registry's address is right") from error
    except requests.exceptions.SSLError as error:
        fix = "see whether the registry's address is right; a certificate authority of your own goes into REQUESTS_CA_BUNDLE"
        raise AdapterError(f"{where}: no safe connection: {redacted(str(error))}", fix=fix) from error
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise Transient(str(error)) from error
    except (requests.exceptions.RequestException, urllib3.exceptions.LocationValueError, ValueError) as error:  # no URL
        raise AdapterError(f"{where}: {redacted(str(error))}", fix="see whether the registry's address is right") from error
    except urllib3.exceptions.HTTPError as error:
        raise Transient(str(error)) from error
