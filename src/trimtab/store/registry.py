"""The store of adapters: names whose versions never change, over content-addressed blobs.

Why it is safe to kill, to share and to copy:

- `index.json` decides what the store contains; in a large store, the files in `changes` do so for the names that they are of (`refs.py`).
  A version exists as soon as one of the two has it, and everything that it needs was on disk before.
- Writers prepare all files under `tmp`, then take the lock, give the files their names, and replace the index or put a file into `changes`.
  Garbage collection takes the same lock. So between a writer's check for a blob and its commit, collection cannot remove that blob.
- A writer locks its files in `tmp` while it lives, and collection leaves locked files alone, however short its grace is. So publishing and
  pulling are safe beside any collection. The grace matters only for callers of `put_blob` and then `adopt`: blobs younger than
  `grace_seconds` are kept, and putting a blob that is there makes it young again. If one is gone nevertheless, `adopt` says so and changes
  nothing.
- Readers take no lock. Index, changes and blobs are replaced by rename, and every byte is compared with its digest before it is used.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

from trimtab.errors import AdapterError
from trimtab.store.collect import GcReport, collect
from trimtab.store.manifest import EMPTY_DESCRIPTOR
from trimtab.store.name import Name
from trimtab.store.names import Ref, check_alias, parse_name
from trimtab.store.publisher import StorePublisher
from trimtab.store.reader import Versions
from trimtab.store.version import Version

__all__ = ["Store", "Version"]


class Store(StorePublisher):
    """A store on this machine's disk. Any number of processes may read and write it at once, and several threads may use one Store.

    root: the store's folder; None: `default_root()`. create: make an empty store if there is none. AdapterError if there is none, or if it
    cannot be trusted.
    """

    def alias(self, ref: str | Ref, alias: str) -> None:
        """Let an alias name a version. If it named another one, it moves."""
        ref, alias = Ref.parse(ref), check_alias(alias)
        with self._changing(f"cannot set {ref.path}@{alias}"), self._layout.locked():
            name = self._find(ref)
            self._write(name.aliased(alias, name.number(ref)))

    def unalias(self, name: str | Ref, alias: str) -> None:
        """Take an alias away. NoSuchAdapter if it is not there."""
        ref, alias = parse_name(name), check_alias(alias)
        with self._changing(f"cannot remove {ref}@{alias}"), self._layout.locked():
            found = self._find(ref)
            found.number(ref.at(alias))
            self._write(found.without_alias(alias))

    def remove(self, ref: str | Ref, *, all: bool = False) -> Versions:
        """Take a version out of the index, or, with all, a whole name; `gc` frees the space. Returns what was removed.

        A version for which an alias stands is kept until the alias moves. Numbers are never used again.
        """
        ref = Ref.parse(ref)
        if all == bool(ref.selector):
            fix = f"write {ref.path}@VERSION for one version, or {ref.path} with --all (all=True) for all of them"
            raise AdapterError(f"{ref} does not say what to remove", fix=fix)
        with self._changing(f"cannot remove {ref}"), self._layout.locked():
            name = self._find(ref)
            numbers = sorted(name.versions) if all else [name.number(ref)]
            held = sorted(a for a, n in name.aliases.items() if n in numbers)
            if held and not all:
                raise AdapterError(f"{name.path}@{numbers[0]} is what {', '.join(held)} stands for", fix="move or remove the alias first")
            removed = [self._bare(name, n) for n in numbers]
            for number in numbers:
                name = name.without(number)
            self._write(replace(name, aliases={}) if all else name)
        return removed

    def gc(self, *, grace_seconds: float = 3600, dry_run: bool = False) -> GcReport:
        """Remove blobs that no version needs and that are older than `grace_seconds`. AdapterError if what is needed cannot be read."""
        with self._changing("cannot collect garbage"), self._layout.locked():
            needed = {EMPTY_DESCRIPTOR.digest}
            if not dry_run:
                with self._trusting():
                    self._refs.fold()
            for name in self.names():
                for number, entry in name.versions.items():
                    manifest = self._manifest(entry, f"{name.path}@{number}")
                    needed |= {entry.digest, *(blob.digest for blob in manifest.blobs)}
            return collect(self._layout, needed, grace_seconds, dry_run)

    def lock(self) -> AbstractContextManager[None]:
        """The writers' lock, to do several things in one step. The thread that holds it can call every method."""
        return self._layout.locked()

    def _bare(self, name: Name, number: int) -> Version:
        """A version that may be damaged, which is a reason to remove it: without files then."""
        try:
            return self.version(name, number)
        except AdapterError:
            return Version(name.path, number, name.versions[number].digest, name.aliases_of(number), "", {}, {})
