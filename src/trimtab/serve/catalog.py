"""Which adapter a tenant means by a name: one of the store, through the tenant's namespaces, or one that it has loaded from a folder.

Names are resolved at every request and not cached. So a publish or a moved alias counts from the next request on, and a request keeps one
version to its end. An adapter of another tenant is answered like one that does not exist. Keys, HTTP and the engine are not known here.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import AdapterError, NotFoundError, TrimtabError
from trimtab.serve.composed import base_is_no_part, check, composed, names_in
from trimtab.serve.served import FolderAdapter, Served, StoredAdapter, below
from trimtab.serve.tenant import EVERYTHING, Tenant
from trimtab.store.names import NoSuchAdapter, Ref
from trimtab.store.registry import Store
from trimtab.store.version import Version

if TYPE_CHECKING:
    from trimtab.model import Base

log = logging.getLogger(__name__)
MAX_NAME = 256
LOADED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,62})?", re.ASCII)
"""Names under which adapters are loaded, as people write them: My-Adapter_V1, org/name."""
MAX_LOADED = 1000
"""Adapters that a tenant may have loaded from folders at a time."""


@dataclass(frozen=True)
class ModelInfo:
    """One line of /v1/models. created: seconds since 1970. root: what the name stands for now. parent: the base's name, None for the base.
    digest: "" for the base."""

    id: str
    created: int
    root: str
    parent: str | None = None
    digest: str = ""


class StoreTrouble(TrimtabError):
    """The store cannot be read: it is damaged, or gone."""

    http_status = 503


@dataclass(frozen=True)
class _Loaded:
    servable: Served
    created: int


class Catalog:
    """What can be asked for. store: None if there is none. folders: under which `load` may read, none: `load` is off.

    base_names: the base's names for clients, none: its own. evict: hears the digest of an adapter that no loaded name stands for any
    more, to free its memory once nobody uses it; not of one of the store, which others ask for by its own name. Under one of the
    folders, a tenant may load what lies in a subfolder named after one of its namespaces; an admin tenant may load all. Safe for any
    number of threads.
    """

    def __init__(
        self,
        base: Base,
        store: Store | None,
        *,
        folders: Sequence[str | Path] = (),
        base_names: Sequence[str] = (),
        evict: Callable[[str], None] = lambda digest: None,
    ):
        self.base, self.store, self._evict = base, store, evict
        self.base_names = tuple(dict.fromkeys(base_names)) or ((base.name,) if base.name else ())
        if not self.base_names:
            raise TrimtabError("the base has no name by which it could be asked for", fix="give it one")
        self.folders = tuple(Path(f).resolve() for f in folders)
        absent = [str(f) for f in self.folders if not f.is_dir()]
        if absent:
            raise TrimtabError("adapters cannot be loaded from these", problems=[f"{f} is no folder" for f in absent])
        self._lock = threading.Lock()
        self._loaded: dict[tuple[str, str], _Loaded] = {}
        self._started = int(time.time())

    def looks_in_store(self, model: str, tenant: Tenant) -> bool:
        """Whether `find` has to read the store, which may take long; else it answers from memory."""
        return model not in self.base_names and (tenant.id, model) not in self._loaded

    def find(self, model: str, tenant: Tenant) -> Served | None:
        """The adapter that this tenant means by this name; None for the base. NotFoundError if it has none of that name.

        A name is the base's, that of an adapter the tenant has loaded, "name[@selector]" in the first of its namespaces that has it, or
        "namespace/name[@selector]". The selector is a version, an alias or a digest; without one, the newest version is meant. Or it is a
        sum of such names, "name+0.5*other".
        """
        if model in self.base_names:
            return None
        with self._lock:
            loaded = self._loaded.get((tenant.id, model))
        if loaded is not None:
            return loaded.servable
        if (parts := names_in(model)) is not None:
            return self.compose(parts, tenant)
        version = self._version(model, tenant)
        if version is None or self.store is None:
            raise _unknown(model)
        return StoredAdapter(version, self.store, self.base)

    def compose(self, parts: Sequence[tuple[str, float]], tenant: Tenant) -> Served | None:
        """The sum of these adapters of this tenant, each with its scale; None where nothing is left of it but the base. NotFoundError, the
        same as of one name alone, if the tenant lacks one of them."""
        check(parts)
        found = [(self.find(name, tenant), scale) for name, scale in parts]
        for (name, _), (part, _) in zip(parts, found, strict=True):
            if part is None:
                raise base_is_no_part(name)
        return composed((part, scale) for part, scale in found if part is not None)

    def models(self, tenant: Tenant, after: str = "") -> Iterator[ModelInfo]:
        """What this tenant may ask for: the base's names, what it has loaded, the newest version of each adapter in its namespaces
        that was not made for another base. Read as they are asked for. after: the id of one of them, to go on behind it."""
        base = self.base_names[0]
        if not after or after in self.base_names:
            began = self.base_names.index(after) + 1 if after else 0
            yield from (ModelInfo(n, self._started, base) for n in self.base_names[began:])
            after = ""
        with self._lock:
            loaded = (tenant.id, after) in self._loaded
        if loaded or "/" not in after:  # else it is one of the store, and these have all been listed
            with self._lock:
                mine = [(name, x) for (owner, name), x in sorted(self._loaded.items()) if owner == tenant.id and name > after]
            yield from (ModelInfo(name, x.created, x.servable.ref, base, x.servable.digest) for name, x in mine)
            after = ""
        for v in self._stored(tenant, after):
            if self.base.base_differs or not (v.fingerprint and self.base.fingerprint) or v.fingerprint == self.base.fingerprint:
                yield ModelInfo(v.name, _seconds(v.created), v.ref, base, v.digest)

    def _stored(self, tenant: Tenant, after: str) -> Iterator[Version]:
        """The newest versions that can be read of the names that a tenant sees, those behind the path `after`."""
        if self.store is None:
            return
        spaces = [None] if EVERYTHING in tenant.namespaces else sorted(tenant.namespaces, key=lambda n: f"{n}/")
        with _readable():
            for name in (n for space in spaces for n in self.store.names(space, after)):
                try:
                    yield self.store.version(name, name.newest)
                except AdapterError as error:
                    log.error("an adapter of the store cannot be read", extra={"told": {"adapter": name.path, "error": error.message}})

    def created(self, model: str, found: Served, tenant: Tenant) -> int:
        """When what a name stands for was loaded or published, in seconds since 1970."""
        with self._lock:
            loaded = self._loaded.get((tenant.id, model))
        if loaded is not None and loaded.servable is found:
            return loaded.created
        return _seconds(found.version.created) if isinstance(found, StoredAdapter) else self._started

    def load(self, name: str, path: str | Path, tenant: Tenant, *, inplace: bool = False) -> None:
        """Read and check an adapter, a folder or one of the store, and give it a name that this tenant alone sees. Reads all of it: call it
        off the event loop. inplace: a name that this tenant has loaded stands for it from the next request on.

        AdapterError if it is refused or the name is taken; NotFoundError, the same one, where there is no such folder, it is not under
        an allowed one, or it is not this tenant's.
        """
        with self._lock:
            again = inplace and (tenant.id, name) in self._loaded
        if not again:
            self._check_free(name, tenant)
        servable = self._source(path, tenant)
        servable.load()  # refused now, not at the first request
        if again:
            self.replace(name, servable, tenant)
        else:
            self.put(name, servable, tenant)

    def _source(self, path: str | Path, tenant: Tenant) -> Served:
        """The adapter that a path, or a name in the store, means to this tenant."""
        if self.store is not None and (version := self._version(str(path), tenant)) is not None:
            return StoredAdapter(version, self.store, self.base)
        if not self.folders:
            raise AdapterError(
                "this server loads no adapters from folders", fix="publish it to the store, or start the server with --adapters-from"
            )
        inside = below(self.folders, str(path), None if tenant.admin else tenant.namespaces)
        if inside is None:
            shown = repr(str(path)[:MAX_NAME])
            raise NotFoundError(f"there is no adapter folder {shown} that this key may load", fix="give the folder's whole path")
        return FolderAdapter.read(*inside, self.base)

    def put(self, name: str, servable: Served, tenant: Tenant) -> None:
        """Give an adapter a name that this tenant alone sees; AdapterError if the name is taken. That an adapter of the store is found by
        it without its namespace does not take it: `find` then means this one, and the other still has its whole name."""
        self._check_free(name, tenant, in_store="/" in name)
        with self._lock:
            if self._loaded.setdefault((tenant.id, name), entry := _Loaded(servable, int(time.time()))) is not entry:
                raise _taken(name)

    def replace(self, name: str, servable: Served, tenant: Tenant) -> None:
        """Let a name that was put or loaded stand for something newer, from the next request on. NotFoundError if there is none."""
        self._move(name, tenant, _Loaded(servable, int(time.time())))

    def unload(self, name: str, tenant: Tenant) -> None:
        """The name is gone for the next request; running ones are not touched. NotFoundError if this tenant has loaded none of that
        name."""
        self._move(name, tenant, None)

    def _move(self, name: str, tenant: Tenant, new: _Loaded | None) -> None:
        with self._lock:
            old = self._loaded.pop((tenant.id, name), None)
            if old is None:
                raise _unknown(name)
            if new is not None:
                self._loaded[tenant.id, name] = new
            used = {x.servable.digest for x in self._loaded.values()}
        if old.servable.digest not in used and not isinstance(old.servable, StoredAdapter):
            self._evict(old.servable.digest)

    def _check_free(self, name: str, tenant: Tenant, *, in_store: bool = True) -> None:
        if not LOADED.fullmatch(name):
            raise AdapterError(
                f"{name[:MAX_NAME]!r} is no name for an adapter",
                fix="at most 63 of A-Z a-z 0-9 . _ -, a letter or digit first, or two such parts with a slash between",
            )
        with self._lock:
            mine = [n for owner, n in self._loaded if owner == tenant.id]
        if name in (*self.base_names, *mine):
            raise _taken(name)
        if in_store and (version := self._version(name, tenant)) is not None:
            raise AdapterError(f"there is a model {name!r} already: {version.ref} of the store", fix="choose another name")
        if len(mine) >= MAX_LOADED:
            raise AdapterError(f"{MAX_LOADED} adapters are loaded from folders already", fix="unload some first")

    def _version(self, model: str, tenant: Tenant) -> Version | None:
        """Looked up only if the tenant may see the namespace, so that neither the message nor the time reveals what others have."""
        path, at, selector = model.partition("@")
        namespace, slash, name = path.rpartition("/")
        if self.store is None or len(model) > MAX_NAME or (at and not selector) or (slash and not tenant.sees(namespace)):
            return None
        if slash or EVERYTHING not in tenant.namespaces:
            return next((v for ns in ([namespace] if slash else tenant.namespaces) if (v := self._lookup(ns, name, selector))), None)
        with _readable():
            there = self.store.namespaces(name)
        everywhere = [v for ns in there if (v := self._lookup(ns, name, selector))]
        if len(everywhere) > 1:  # no order says which comes first, and a guess would serve the wrong one
            raise AdapterError(f"several namespaces have {model!r}", problems=[v.ref for v in everywhere], fix="give the whole name")
        return everywhere[0] if everywhere else None

    def _lookup(self, namespace: str, name: str, selector: str) -> Version | None:
        """The version of a name that is there; None without such a version."""
        assert self.store is not None
        try:
            ref = Ref(namespace, name, selector)
        except AdapterError:  # no version can have such a name or selector
            return None
        with _readable():
            found = self.store.get(ref)
            try:
                return self.store.version(found, found.number(ref)) if found is not None and found.versions else None
            except NoSuchAdapter:
                return None


@contextmanager
def _readable() -> Iterator[None]:
    """A store that is damaged or gone is our trouble, not a wrong name."""
    try:
        yield
    except (AdapterError, OSError) as error:
        log.error("the store cannot be read", extra={"told": {"error": str(error)}})
        raise StoreTrouble("the store of adapters cannot be read", fix="try again; the server's log says more") from error


def _seconds(created: str) -> int:
    """An ISO time as seconds since 1970; 0 where a version's files say none that can be read."""
    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0


def _unknown(model: str) -> NotFoundError:
    return NotFoundError(f"the model {model[:MAX_NAME]!r} does not exist", fix="GET /v1/models lists the models that this key may use")


def _taken(name: str) -> AdapterError:
    return AdapterError(f"there is a model {name!r} already", fix="choose another name, or unload that one first")
