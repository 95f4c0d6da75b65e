"""Who may read what `trimtab studio` shows: everybody on this machine, or whoever has the token where it listens elsewhere too. Who may
change something: whoever has the key that it has printed, on this machine too."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from trimtab.errors import AuthError
from trimtab.http.commands import Commands
from trimtab.http.reader import Reader
from trimtab.store.registry import Store
from trimtab.train.beginning import Beginner
from trimtab.train.follow import RunFolders

bearer = HTTPBearer(auto_error=False)
DOWNLOADS = 2
"""Adapters that are sent as a file at a time."""
BASE = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Shown:
    """What a studio shows. store: None if there is none. new_store: where the first adapter that is published makes one. token: None: none
    is asked for. hosts: Host headers that are answered; None: all. data: folders of rows that may be shown, beside that of the runs. base:
    on which rows are read that no run has read. key: what must be given to change something; None: nothing can be changed."""

    runs: RunFolders
    store: Store | None = None
    token: str | None = None
    hosts: frozenset[str] | None = None
    data: tuple[Path, ...] = ()
    base: str = BASE
    reader: Reader = field(default_factory=Reader)
    helper: Reader = field(default_factory=Reader)
    """Another process, for what takes a moment while the reader reads for minutes."""
    key: str | None = None
    new_store: Path | None = None

    commands: Commands = field(default_factory=Commands)
    downloads: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(DOWNLOADS))

    @property
    def shelf(self) -> Store | None:
        """The store; None as long as nothing has been published."""
        made = self.store is None and self.new_store is not None and (self.new_store / "index.json").is_file()
        return self._made if made else self.store

    @cached_property
    def _made(self) -> Store:
        """The one that the first adapter has made."""
        return Store(self.new_store)

    @cached_property
    def beginner(self) -> Beginner:
        """Of runs, in the folder that is shown."""
        return Beginner(self.runs.root)

    @property
    def folders(self) -> tuple[Path, ...]:
        """In which rows may lie; paths from outside start at the first."""
        return self.runs.root, *(folder.resolve() for folder in self.data)

    def close(self) -> None:
        self.reader.close()
        self.helper.close()
        self.commands.close()


async def shown(request: Request) -> Shown:
    """What the app was made with."""
    found: Shown = request.app.state.studio
    return found


Studio = Annotated[Shown, Depends(shown)]


Given = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


async def allowed(studio: Studio, given: Given) -> None:
    """AuthError (401) without the token, where one is asked for."""
    if studio.token is None:
        return
    if given is None or not secrets.compare_digest(given.credentials.encode(), studio.token.encode()):
        raise AuthError("this page needs its key", fix="open the address that `trimtab studio` printed, or give what stands behind #key=")


async def may_change(studio: Studio, given: Given) -> None:
    """AuthError without the key: 401, or 403 where there is none that would do."""
    if studio.key is None:
        error = AuthError("nothing can be changed here", fix="use the page of `trimtab studio`")
        error.http_status = 403
        raise error
    if given is None or not secrets.compare_digest(given.credentials.encode(), studio.key.encode()):
        raise AuthError(
            "the key is needed to change something", fix="open the address that `trimtab studio` printed, or give what stands behind #key="
        )
