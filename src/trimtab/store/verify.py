"""Reads every byte of a store, and reports everything that is wrong with it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from trimtab.errors import AdapterError
from trimtab.store.blobs import read_whole
from trimtab.store.files import Refusal
from trimtab.store.index import MAX_INDEX_BYTES, Index, parse_index
from trimtab.store.layout import PARTS, Layout
from trimtab.store.manifest import MANIFEST_TYPE, Descriptor, Manifest, parse_manifest
from trimtab.store.name import Entry, Name
from trimtab.store.names import DIGEST
from trimtab.store.refs import Refs, changed_path


@dataclass(frozen=True)
class VerifyReport:
    """versions: in the index. blobs, bytes: that were hashed. problems: one line each; none means that every version is whole."""

    versions: int
    blobs: int
    bytes: int
    problems: tuple[str, ...]


def verify(layout: Layout) -> VerifyReport:
    """Rehash everything. Takes no lock: index.json is read first, so what is published meanwhile makes no difference."""
    problems: list[str] = []
    try:
        layout.check_parts()
    except AdapterError as error:
        problems += error.problems
    names = _names(layout, problems)
    problems += _strangers(layout)
    sizes = _hash_all(layout, problems)
    versions = 0
    for _, name in sorted(names.items()):
        for number, entry in sorted(name.versions.items()):
            versions += 1
            problems += [f"{name.path}@{number}: {p}" for p in _version_problems(layout, entry, sizes)]
    return VerifyReport(versions, len(sizes), sum(sizes.values()), tuple(problems))


def _names(layout: Layout, problems: list[str]) -> dict[str, Name]:
    """Changes are read before the index: what is folded meanwhile is in both."""
    refs, changes = Refs(layout), {}
    for path in refs.waiting():
        try:
            changes[path] = refs.change(path)
        except Refusal as reason:
            problems += str(reason).splitlines()
    try:
        data = read_whole(layout.index, MAX_INDEX_BYTES, "index.json")
    except Refusal as reason:
        problems.append(str(reason))
        data = Index().to_bytes()
    index, found = parse_index(data)
    problems += found
    return {**index.names, **{path: name for path, name in changes.items() if name is not None}}


def _strangers(layout: Layout) -> list[str]:
    """Files and folders that no writer of a store puts there."""
    found = [f"{name} does not belong in a store" for name in sorted(os.listdir(layout.root)) if name not in PARTS]  # noqa: PTH208 - names
    blobs = layout.blobs.folder
    found += [f"blobs/{name} does not belong in a store" for name in sorted(os.listdir(blobs.parent)) if name != blobs.name]  # noqa: PTH208
    if layout.changes.is_dir():
        found += [f"changes/{f} does not belong in a store" for f in sorted(os.listdir(layout.changes)) if not changed_path(f)]  # noqa: PTH208
    return found


def _hash_all(layout: Layout, problems: list[str]) -> dict[str, int]:
    """digest -> size of every blob that is as its name says."""
    sizes = {}
    with os.scandir(layout.blobs.folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            digest = f"sha256:{entry.name}"
            status = entry.stat(follow_symlinks=False)
            if DIGEST.fullmatch(digest) is None:
                problems.append(f"blobs/sha256/{entry.name} is not named by a digest")
            elif not stat.S_ISREG(status.st_mode):
                kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
                problems.append(f"blob {digest} is {kind}")
            elif (reason := layout.blobs.problem(Descriptor("", digest, status.st_size))) is not None:
                problems.append(reason)
            else:
                sizes[digest] = status.st_size
    return sizes


def _version_problems(layout: Layout, entry: Entry, sizes: dict[str, int]) -> list[str]:
    if sizes.get(entry.digest) != entry.size:
        return [_lacking("its manifest", Descriptor(MANIFEST_TYPE, *entry), sizes)]
    try:
        manifest = parse_manifest(layout.blobs.read(Descriptor(MANIFEST_TYPE, *entry)), "its manifest")
    except Refusal as reason:
        return str(reason).splitlines()
    return [_lacking(what, blob, sizes) for what, blob in _needs(manifest) if sizes.get(blob.digest) != blob.size]


def _needs(manifest: Manifest) -> list[tuple[str, Descriptor]]:
    return [("its empty config", manifest.blobs[0]), *manifest.files.items()]


def _lacking(what: str, blob: Descriptor, sizes: dict[str, int]) -> str:
    if blob.digest in sizes:
        return f"{what}: blob {blob.digest} has {sizes[blob.digest]:,} bytes; its descriptor says {blob.size:,}"
    return f"{what}: blob {blob.digest} is missing or damaged"
