"""Who may read what `trimtab studio` shows: everybody on this machine, or whoever has the token where it listens elsewhere too."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from trimtab.errors import AuthError
from trimtab.http.reader import Reader
from trimtab.store.registry import Store
from trimtab.train.follow import RunFolders

bearer = HTTPBearer(auto_error=False)
BASE = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Shown:
    """What a studio shows. store: None if there is none. token: None: none is asked for. hosts: Host headers that are answered;
    None: all. data: folders of rows that may be shown, beside that of the runs. base: on which rows are read that no run has read."""

    runs: RunFolders
    store: Store | None = None
    token: str | None = None
    hosts: frozenset[str] | None = None
    data: tuple[Path, ...] = ()
    base: str = BASE
    reader: Reader = field(default_factory=Reader)
    helper: Reader = field(default_factory=Reader)
    """Another process, for what takes a moment while the reader reads for minutes."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """In which rows may lie; paths from outside start at the first."""
        return self.runs.root, *(folder.resolve() for folder in self.data)

    def close(self) -> None:
        self.reader.close()
        self.helper.close()


async def shown(request: Request) -> Shown:
    """What the app was made with."""
    found: Shown = request.app.state.studio
    return found


Studio = Annotated[Shown, Depends(shown)]


async def allowed(studio: Studio, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
    """AuthError (401) without the token, where one is asked for."""
    if studio.token is None:
        return
    if given is None or not secrets.compare_digest(given.credentials.encode(), studio.token.encode()):
        raise AuthError("this page needs its token", fix="open the address that `trimtab studio` printed, or give the token behind #key=")
