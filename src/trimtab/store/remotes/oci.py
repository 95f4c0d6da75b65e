"""An OCI registry: the distribution API's calls for blobs, manifests and tags."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urljoin, urlsplit

from trimtab.errors import AdapterError
from trimtab.store.files import MAX_JSON_BYTES, digest_of
from trimtab.store.manifest import MANIFEST_TYPE, Descriptor
from trimtab.store.names import DIGEST
from trimtab.store.remotes.address import CREDENTIALS, TAG, RegistryAddress, redacted
from trimtab.store.remotes.fetch import Transient, patiently
from trimtab.store.remotes.oci_session import open_provider, speaking
from trimtab.store.remotes.source import Source

if TYPE_CHECKING:
    import requests

    from trimtab.store.registry import Version

PIECE_BYTES = 2**14
"""Read at once: of what has come, less than that is lost when a connection is reset or the process ends."""
BUSY = (408, 425, 429, 500, 502, 503, 504)


class Registry:
    """One repository of one registry. Plain HTTP is spoken to this machine's own registries only."""

    def __init__(self, address: RegistryAddress):
        self.address, self.where = address, str(address)
        provider = open_provider(address)
        self._session, self._auth, scheme = provider.session, provider.auth, provider.prefix
        self._root = f"{scheme}://{address.registry}/v2/{address.repository}"
        self._headers: dict[str, str] = {}

    # ---- reading ----

    def manifest(self) -> bytes:
        """The manifest that the address names, `latest` where it names none; its digest compared where the address or an answer has one."""
        reference = self.address.reference or "latest"
        return patiently(lambda: self._manifest(reference), self.where)

    def _manifest(self, reference: str) -> bytes:
        with self._ask("GET", f"/manifests/{reference}", {"Accept": MANIFEST_TYPE}) as answer:
            if answer.status_code == 404:
                tags = self._tags()
                fix = f"tags there are: {', '.join(tags[-20:])}" if tags else "push one, or see whether the repository's name is right"
                raise AdapterError(f"{self.where}: no tag {reference!r}", fix=fix)
            self._expect(answer, 200)
            data = _bounded(answer, MAX_JSON_BYTES, f"{self.where}: its manifest")
        promised = reference if DIGEST.fullmatch(reference) else answer.headers.get("Docker-Content-Digest")
        if promised and promised != digest_of(data):
            raise AdapterError(
                f"{self.where}: the manifest that arrived is not {promised}", fix="pull again, or do not trust that registry"
            )
        return data

    def _tags(self) -> list[str]:
        with self._ask("GET", "/tags/list") as answer:
            if answer.status_code != 200:
                return []
            found = _json(answer)
        tags = found.get("tags") if isinstance(found, dict) else None
        return [t for t in tags if isinstance(t, str) and TAG.fullmatch(t)] if isinstance(tags, list) else []

    def has(self, blob: Descriptor) -> bool:
        """Whether the repository holds a blob of this digest and size."""

        def look() -> bool:
            with self._ask("HEAD", f"/blobs/{blob.digest}") as answer:
                if answer.status_code != 404:
                    self._expect(answer, 200)
                return answer.status_code == 200 and answer.headers.get("Content-Length") == str(blob.size)

        return patiently(look, self.where)

    def read(self, blob: Descriptor, start: int) -> Iterator[bytes]:
        """A blob's bytes from `start` on; a registry that knows no ranges sends them all, and the first ones are dropped."""
        headers = {"Range": f"bytes={start}-{blob.size - 1}"} if start else {}
        with self._ask("GET", f"/blobs/{blob.digest}", headers) as answer:
            self._expect(answer, 200, *([206] if start else []))
            if answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise AdapterError(f"{self.where} answers another range than was asked for", fix="do not trust that registry")
            skip = start if answer.status_code == 200 else 0
            for piece in _pieces(answer):
                yield piece[skip:]
                skip = max(0, skip - len(piece))

    # ---- writing ----

    def write(self, blob: Descriptor, source: Source) -> None:
        """Upload a blob; the registry compares it with its digest before it lets anybody see it."""

        def send() -> None:
            with self._ask("POST", "/blobs/uploads/", {"Content-Length": "0"}) as answer:
                self._expect(answer, 202)
                with speaking(self.where):
                    url = urljoin(f"{self._root}/blobs/uploads/", answer.headers.get("Location", ""))
                    url += ("&" if urlsplit(url).query else "?") + f"digest={blob.digest}"
            with self._ask("PUT", url, {"Content-Type": "application/octet-stream"}, source) as answer:
                self._expect(answer, 201)

        patiently(send, f"{self.where}, {blob.digest},")

    def finish(self, version: Version, manifest: bytes) -> list[str]:
        """Upload the manifest under its tags: the address's, or else the version's number and its aliases. Returns them.

        AdapterError if a tag that is a number is taken by other content: a version never changes.
        """
        if DIGEST.fullmatch(self.address.reference):
            raise AdapterError(f"{self.where}: a digest cannot be pushed to", fix="give a tag, or none")
        tags = [self.address.reference] if self.address.reference else [str(version.version), *version.aliases]
        if (number := tags[0]).isdigit():
            there = patiently(lambda: self._digest_there(number), self.where)
            if there not in (None, version.digest):
                fix = f"push to a tag of your own, for example {self.where.removesuffix(':' + number)}:{number}-{version.digest[7:15]}"
                raise AdapterError(f"{self.where}: tag {number} is there already, with other content ({there})", fix=fix)
        for tag in tags:
            patiently(lambda tag=tag: self._put_manifest(tag, manifest), self.where)  # type: ignore[misc]
        return tags

    def _digest_there(self, tag: str) -> str | None:
        with self._ask("HEAD", f"/manifests/{tag}", {"Accept": MANIFEST_TYPE}) as answer:
            if answer.status_code == 404:
                return None
            self._expect(answer, 200)
            return answer.headers.get("Docker-Content-Digest", "")

    def _put_manifest(self, tag: str, manifest: bytes) -> None:
        with self._ask("PUT", f"/manifests/{tag}", {"Content-Type": MANIFEST_TYPE}, manifest) as answer:
            self._expect(answer, 201)

    # ---- speaking ----

    @contextmanager
    def _ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, body: Any = None) -> Iterator[requests.Response]:
        """One request, and once more with credentials if the registry asks for them. They are sent to the registry itself only."""
        url = self._root + path if path.startswith("/") else path
        ours = urlsplit(url)[:2] == urlsplit(self._root)[:2]
        asked = {"Accept-Encoding": "identity", **(headers or {})}
        with speaking(self.where):
            answer = self._session.request(method, url, headers=asked | (self._headers if ours else {}), data=body, stream=True)
            if answer.status_code == 401 and ours:
                with closing(answer):
                    self._authenticate(answer)
                answer = self._session.request(method, url, headers=asked | self._headers, data=body, stream=True)
            with closing(answer):
                yield answer

    def _authenticate(self, answer: requests.Response) -> None:
        """Make `_headers` from what the registry asks for and what is known of it."""
        challenge = answer.headers.get("Www-Authenticate", "")
        basic = getattr(self._auth, "_basic_auth", None)
        if challenge.lower().startswith("basic") and basic and not self._headers:
            self._headers = {"Authorization": f"Basic {basic}"}
            return
        realm = re.search(r'realm="([^"]*)"', challenge)
        if challenge.lower().startswith("bearer") and realm:
            if not realm[1].startswith("https://") and not self.address.is_local:
                raise AdapterError(
                    f"{self.where} wants credentials to be sent to {redacted(realm[1])!r}, unencrypted", fix="do not trust that registry"
                )
            self._auth.token = None
            headers, changed = self._auth.authenticate_request(answer, {})
            if changed:
                self._headers = headers
                return
        self._refused(answer.status_code)

    def _refused(self, status: int) -> NoReturn:
        raise AdapterError(f"{self.where}: the registry refuses access ({status})", fix=CREDENTIALS["oci"])

    def _expect(self, answer: requests.Response, *good: int) -> None:
        status = answer.status_code
        if status in good:
            return
        if status in (401, 403):
            self._refused(status)
        said = redacted(_errors(answer))
        if status in BUSY:
            raise Transient(f"it answers {status} {answer.reason}{said}", _seconds(answer.headers.get("Retry-After")))
        hint = "see whether the repository's name is right and whether you may write there"
        raise AdapterError(f"{self.where}: the registry answers {status} {answer.reason}{said}", fix=hint)


def _pieces(answer: requests.Response) -> Iterator[bytes]:
    """The body as it came: nothing is unpacked, so a small answer never becomes a large one."""
    yield from answer.raw.stream(PIECE_BYTES, decode_content=False)


def _bounded(answer: requests.Response, limit: int, what: str) -> bytes:
    data = b""
    for piece in _pieces(answer):
        data += piece
        if len(data) > limit:
            raise AdapterError(f"{what} has more than {limit:,} bytes", fix="see whether this is an adapter that trimtab pushed")
    return data


def _json(answer: requests.Response) -> Any:
    """A small answer's JSON; None if it is none."""
    try:
        return json.loads(_bounded(answer, MAX_JSON_BYTES, "an answer"))
    except (ValueError, RecursionError, AdapterError):
        return None


def _errors(answer: requests.Response) -> str:
    """What an answer says went wrong, as registries spell it; "" where it says nothing."""
    found = _json(answer)
    errors = found.get("errors") if isinstance(found, dict) else None
    said = [str(e.get("message", ""))[:200] for e in errors if isinstance(e, dict)] if isinstance(errors, list) else []
    return f" ({'; '.join(s for s in said if s)})" if any(said) else ""


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isdigit() else None
