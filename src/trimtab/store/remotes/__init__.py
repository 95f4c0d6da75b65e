"""Moving adapters between the store and elsewhere: the Hugging Face hub, OCI registries, and file systems that fsspec knows.

A pull trusts nobody. Sizes are checked before a byte is fetched, every byte is compared with a digest on arrival, and the store's own
checks run at the end. Until then there are only partial files in the store's `tmp`. An interrupted pull continues from them. A push sends
only what the other side lacks, and names last, so that everything that has a name there is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trimtab.errors import AdapterError
from trimtab.store.blobs import open_regular
from trimtab.store.files import AdapterFolder, Refusal
from trimtab.store.manifest import EMPTY_DESCRIPTOR, MAX_ADAPTER_BYTES, Descriptor, Manifest, parse_manifest
from trimtab.store.names import Ref, check_alias, parse_name
from trimtab.store.publisher import BlobsMissing
from trimtab.store.registry import Store, Version
from trimtab.store.remotes.address import FolderAddress, HubAddress, RegistryAddress, parse_address
from trimtab.store.remotes.deadline import PULL_SECONDS, Deadline
from trimtab.store.remotes.fetch import ATTEMPTS, Moved, Part, download, held
from trimtab.store.remotes.fs import FolderRemote
from trimtab.store.remotes.hub import Hub
from trimtab.store.remotes.oci import Registry
from trimtab.store.remotes.source import Source

__all__ = ["PULL_SECONDS", "Begin", "Report", "pull", "push"]

Begin = Callable[[str, int, int], Moved]
"""Told of each file before it moves: its name, its bytes, and those that are there already. What it returns is told of every piece."""


@dataclass(frozen=True)
class Report:
    """What moved. version: the store's. there: its names on the other side. moved, skipped: bytes; skipped ones were there already."""

    version: Version
    url: str
    there: tuple[str, ...]
    moved: int
    skipped: int


class Remote(Protocol):
    """A place that keeps blobs by digest, and manifests under tags."""

    where: str

    def manifest(self) -> bytes: ...
    def has(self, blob: Descriptor) -> bool: ...
    def read(self, blob: Descriptor, start: int) -> Iterator[bytes]: ...
    def write(self, blob: Descriptor, source: Source) -> None: ...
    def finish(self, version: Version, manifest: bytes) -> list[str]: ...


def push(store: Store, ref: str | Ref, url: str, *, begin: Begin | None = None) -> Report:
    """Send a version to `url`. Files that are there are not sent again; the names there are written last.

    AdapterError if there is no such version, the URL is none or carries credentials, or the other side does not take it.
    """
    address = parse_address(url)
    version = store.resolve(ref)
    count = Count(begin)
    if isinstance(address, HubAddress):
        commit = Hub(address).push(store, version, count.begin)
        return Report(version, str(address), (commit,), count.moved, count.skipped)
    remote = _remote(address, Ref.parse(version.name))
    data = store.manifest(version.digest)
    for name, blob in _named(_parse(data, f"the manifest of {version.ref}")):
        if remote.has(blob):
            count.skip(name, blob.size)
        else:
            remote.write(blob, Source(blob, store.blob_path(blob.digest), count.begin(name, blob.size, 0)))
    names = remote.finish(version, data)
    return Report(version, str(address), tuple(names), count.moved, count.skipped)


def pull(
    store: Store,
    url: str,
    name: str | Ref,
    *,
    aliases: Sequence[str] = (),
    begin: Begin | None = None,
    timeout_s: float = PULL_SECONDS,
) -> Report:
    """Fetch the adapter that `url` names and publish it as the next version of `name`; what the newest version holds is not doubled.

    timeout_s: for all of it. AdapterError, and nothing of it to be seen in the store, where the URL is none or carries credentials, the
    other side lacks it, lies about it or takes longer, or the store's checks refuse it. What has come is kept, and the next pull goes on
    from it.
    """
    address, target = parse_address(url), parse_name(name)
    for alias in aliases:
        check_alias(alias)
    deadline = Deadline[Report](timeout_s, str(address))

    def fetch() -> Report:
        count = Count(begin)
        if isinstance(address, HubAddress):
            return _pull_folder(store, Hub(address), target, aliases, count, deadline)
        remote = _remote(address, target)
        for attempt in range(ATTEMPTS):
            try:
                return _pull_blobs(store, remote, target, aliases, count, deadline)
            except BlobsMissing:  # what was here when it was looked for has been collected since
                if attempt + 1 == ATTEMPTS:
                    raise
        raise AssertionError("not reached")

    return deadline.run(fetch)


def _remote(address: FolderAddress | RegistryAddress, wanted: Ref) -> Remote:
    return Registry(address) if isinstance(address, RegistryAddress) else FolderRemote(address, wanted)


class Count:
    """Adds up the bytes that move, for the report, and passes them on to the progress display."""

    def __init__(self, begin: Begin | None):
        self._begin, self.moved, self.skipped = begin, 0, 0

    def begin(self, name: str, size: int, there: int) -> Moved:
        shown = self._begin(name, size, there) if self._begin is not None else None
        self.skipped += there

        def moved(count: int) -> None:
            self.moved += count
            if shown is not None:
                shown(count)

        return moved

    def skip(self, name: str, size: int) -> None:
        self.begin(name, size, size)


# ---- pulling ----


def _pull_blobs(store: Store, remote: Remote, target: Ref, aliases: Sequence[str], count: Count, deadline: Deadline[Report]) -> Report:
    """Fetch the blobs that the store lacks into tmp; when all are whole, they, the manifest and the version get their places at once."""
    data = remote.manifest()
    manifest = _parse(data, f"{remote.where}: its manifest")
    wanted = [(name, blob) for name, blob in _named(manifest) if not _is_here(store, blob)]
    _check_size(store, remote.where, sum(b.size for b in manifest.blobs), sum(b.size for _, b in wanted))
    for name, blob in _named(manifest):
        if (name, blob) not in wanted:
            count.skip(name, blob.size)
    fetched: dict[str, Path] = {}
    with ExitStack() as stack:
        # in the order of digests, so that two pulls never wait for each other in a circle
        for name, blob in sorted(wanted, key=lambda pair: pair[1].digest):
            partial = _partial(store, blob.digest)
            file = stack.enter_context(held(partial))
            if _is_here(store, blob):  # another pull has put it in while this one waited
                partial.unlink()
                count.skip(name, blob.size)
                continue
            part = Part(name, blob.digest, blob.size)
            moved = count.begin(name, blob.size, min(blob.size, os.fstat(file).st_size))
            download(part, lambda start, blob=blob: remote.read(blob, start), file, remote.where, moved, deadline)  # type: ignore[misc]
            fetched[blob.digest] = partial
        with deadline.committing(), _taken(fetched.values()):
            version = store.adopt(data, target.path, aliases=aliases, blobs=fetched)
    return Report(version, remote.where, (version.digest,), count.moved, count.skipped)


def _pull_folder(store: Store, hub: Hub, target: Ref, aliases: Sequence[str], count: Count, deadline: Deadline[Report]) -> Report:
    """Fetch a folder's files into tmp, and publish it as any folder is published."""
    parts = hub.parts()
    here = {p.name: store.blob_path(p.digest) for p in parts if p.digest.startswith("sha256:") and _is_here(store, p)}
    _check_size(store, hub.where, sum(p.size for p in parts), sum(p.size for p in parts if p.name not in here))
    partials = {p.name: _partial(store, f"{hub.where} {hub.commit} {p.name}") for p in parts if p.name not in here}
    with ExitStack() as stack:
        for part in sorted(parts, key=lambda p: partials.get(p.name, Path())):
            if part.name in here:
                count.skip(part.name, part.size)
                continue
            file = stack.enter_context(held(partials[part.name]))
            moved = count.begin(part.name, part.size, min(part.size, os.fstat(file).st_size))
            download(part, lambda start, part=part: hub.read(part, start), file, hub.where, moved, deadline)  # type: ignore[misc]
        with deadline.committing(), _taken(partials.values()):
            version = store.publish_opened(_Fetched(Path(hub.where), partials | here), target.path, aliases=aliases)
    return Report(version, hub.where, (hub.commit,), count.moved, count.skipped)


@contextmanager
def _taken(partials: Iterable[Path]) -> Iterator[None]:
    """Remove fetched files once the store has what it needs of them, or has refused them; not where it could not be written."""
    try:
        yield
    except AdapterError as error:
        if isinstance(error, BlobsMissing) or isinstance(error.__cause__, OSError):
            raise
        for path in partials:
            path.unlink(missing_ok=True)
        raise
    for path in partials:
        path.unlink(missing_ok=True)  # it is gone where its blob took its place


class _Fetched(AdapterFolder):
    """The files of a pull as those of a folder. path: what it is called."""

    def __init__(self, path: Path, files: Mapping[str, Path]):
        self.path, self._files = path, files

    def names(self) -> list[str]:
        return sorted(self._files)

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[int, int]]:
        with open_regular(self._files[name], name) as opened:
            yield opened


def _parse(data: bytes, what: str) -> Manifest:
    try:
        return parse_manifest(data, what)
    except Refusal as error:
        fix = "see whether it is an adapter that trimtab pushed"
        raise AdapterError(f"{what} is refused", problems=str(error).splitlines(), fix=fix) from error


def _named(manifest: Manifest) -> list[tuple[str, Descriptor]]:
    """What a manifest needs, each once: two files may be one blob."""
    found = {blob.digest: (name, blob) for name, blob in (("", EMPTY_DESCRIPTOR), *manifest.files.items())}
    return list(found.values())


def _check_size(store: Store, where: str, total: int, wanted: int) -> None:
    """Refuse, before anything is fetched, what is too large for anybody or for this disk (each byte is there twice for a while)."""
    if total > MAX_ADAPTER_BYTES:
        fix = "an adapter that large is none that trimtab makes; do not trust that source"
        raise AdapterError(f"{where}: it claims {total:,} bytes; at most {MAX_ADAPTER_BYTES:,} are fetched", fix=fix)
    free = shutil.disk_usage(_tmp(store)).free
    if 2 * wanted > free:
        raise AdapterError(
            f"{where}: {wanted:,} bytes are to be fetched, and {free:,} are free in {store.root}", fix="make room: twice as much is needed"
        )


def _is_here(store: Store, blob: Descriptor | Part) -> bool:
    """Whether the store has a blob, undamaged. A damaged one is fetched again, which repairs it. The empty blob is never sent."""
    if not store.has_blob(blob.digest):
        return blob == EMPTY_DESCRIPTOR
    with store.blob_path(blob.digest).open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == blob.digest


def _partial(store: Store, key: str) -> Path:
    return _tmp(store) / f"pull-{hashlib.sha256(key.encode()).hexdigest()[:40]}"


def _tmp(store: Store) -> Path:
    folder = store.root / "tmp"
    folder.mkdir(exist_ok=True)
    return folder
