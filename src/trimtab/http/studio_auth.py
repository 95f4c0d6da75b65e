"""Who may read what `trimtab studio` shows: everybody on this machine, or whoever has the token where it listens elsewhere too."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from trimtab.errors import AuthError
from trimtab.store.registry import Store
from trimtab.train.follow import RunFolders

bearer = HTTPBearer(auto_error=False)


@dataclass(frozen=True)
class Shown:
    """What a studio shows. store: None if there is none. token: None: none is asked for. hosts: Host headers that are answered;
    None: all."""

    runs: RunFolders
    store: Store | None = None
    token: str | None = None
    hosts: frozenset[str] | None = None


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
