"""Where adapters move to and from, as a URL. Knows the spelling of addresses; nothing of servers, libraries or the store.

    hf://ORG/REPO[@REVISION]                   a repository of the Hugging Face hub
    oci://REGISTRY[:PORT]/REPO/NAME[:TAG]      a repository of an OCI registry; also NAME@sha256:…
    SCHEME://…[#NAMESPACE/NAME[@SELECTOR]]     a folder that fsspec can reach (s3, gs, file, memory, …), which may hold many adapters

Credentials never stand in a URL: it goes into shell histories, process lists and logs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from trimtab.errors import AdapterError
from trimtab.store.names import DIGEST, Ref

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
HOST = re.compile(r"([A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
SCHEME = re.compile(r"[a-z][a-z0-9+-]*")
LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|\[::1\]")

CREDENTIALS = {
    "hf": "log in once with `hf auth login`, or set HF_TOKEN",
    "oci": "log in once with `docker login`, or `skopeo login --authfile ~/.docker/config.json`",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or keep them in ~/.aws/credentials",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}
OTHER_CREDENTIALS = "leave them to the environment or the credential file of the storage's library"


@dataclass(frozen=True)
class HubAddress:
    """A repository of the hub. revision: branch, tag or commit; "" is the default branch."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class RegistryAddress:
    """A repository of a registry. reference: tag or digest; "" where the URL names none."""

    registry: str
    repository: str
    reference: str

    def __str__(self) -> str:
        separator = "@" if DIGEST.fullmatch(self.reference) else ":"
        return f"oci://{self.registry}/{self.repository}" + (f"{separator}{self.reference}" if self.reference else "")

    @property
    def is_local(self) -> bool:
        """Whether the registry is this machine's own, which is the one case in which plain HTTP is spoken."""
        return LOOPBACK.fullmatch(re.sub(r":[0-9]+$", "", self.registry)) is not None


@dataclass(frozen=True)
class FolderAddress:
    """A folder of a file system or object store. ref: the adapter in it that the URL names, if it names one."""

    scheme: str
    root: str
    ref: Ref | None

    def __str__(self) -> str:
        return self.root + (f"#{self.ref}" if self.ref else "")


Address = HubAddress | RegistryAddress | FolderAddress


def parse_address(url: str) -> Address:
    """The address that a URL spells. AdapterError, which shows no credentials, where it is none or carries some."""
    shown = redacted(url)
    scheme, separator, rest = url.partition("://")
    if not separator or not SCHEME.fullmatch(scheme):
        raise AdapterError(
            f"{shown!r} is no URL that adapters move to or from",
            fix="use hf://org/repo, oci://registry/repo/name, s3://bucket/folder or file:///folder",
        )
    if "::" in url.replace("[::", "[") or any(ord(c) <= 32 or ord(c) == 127 for c in url):
        raise AdapterError(f"{shown!r}: chained URLs, blanks and control characters are not read", fix="give one plain URL")
    if "@" in rest.partition("/")[0] or "?" in rest:
        what = "a query" if "?" in rest else "a user name or password"
        raise AdapterError(f"{shown!r} carries {what}", fix=f"take it out of the URL; {CREDENTIALS.get(scheme, OTHER_CREDENTIALS)}")
    return _hub(url, rest) if scheme == "hf" else _registry(url, rest) if scheme == "oci" else _folder(url, scheme)


def redacted(text: str) -> str:
    """Text from elsewhere as it may be shown: without what a terminal would obey, and without what URLs in it may hide (user names,
    passwords, queries: a signed URL's signature stands there)."""
    text = "".join(c if c.isprintable() else " " for c in text)
    text = re.sub(r"(?<=://)[^/\s'\"@]*@", "***@", text)
    return re.sub(r"(?<=[^\s'\"])\?[^\s'\")>]+", "?***", text)


def _hub(url: str, rest: str) -> HubAddress:
    repository, at, revision = rest.partition("@")
    names = repository.rstrip("/").split("/")
    good = len(names) == 2 and all(HUB_NAME.fullmatch(n) and ".." not in n and "--" not in n for n in names)
    if not good or (at and (not REVISION.fullmatch(revision) or ".." in revision)):
        raise AdapterError(f"{url!r} is no repository of the hub", fix="write hf://org/repo, or hf://org/repo@revision")
    return HubAddress("/".join(names), revision)


def _registry(url: str, rest: str) -> RegistryAddress:
    registry, _, path = rest.partition("/")
    path, at, digest = path.partition("@")
    path, colon, tag = path.partition(":") if not at else (path, "", "")
    good = HOST.fullmatch(registry) and REPOSITORY.fullmatch(path) and len(path) <= 255
    if not good or (at and not DIGEST.fullmatch(digest)) or (colon and not TAG.fullmatch(tag)):
        fix = "write oci://registry[:port]/repo/name, with :tag or @sha256:… behind it; names are in lower case"
        raise AdapterError(f"{url!r} is no repository of an OCI registry", fix=fix)
    return RegistryAddress(registry, path, digest or tag)


def _folder(url: str, scheme: str) -> FolderAddress:
    root, hash_, ref = url.partition("#")
    root = root.rstrip("/")
    try:
        path = urlsplit(root)
    except ValueError as error:
        raise AdapterError(f"{url!r} is no URL: {error}", fix="write for example s3://bucket/folder or file:///srv/adapters") from None
    if ".." in path.path.split("/") or not (path.netloc or path.path.strip("/")):
        raise AdapterError(
            f"{url!r} names no folder, or leaves it through '..'", fix="write for example s3://bucket/folder or file:///srv/adapters"
        )
    if scheme in ("file", "local") and path.netloc:
        raise AdapterError(
            f"{url!r}: {path.netloc!r} stands where a host would", fix=f"write file:///{path.netloc}{path.path}, with an absolute path"
        )
    return FolderAddress(scheme, root, Ref.parse(ref) if hash_ else None)
