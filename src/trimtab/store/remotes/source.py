"""A blob of the store on its way out: read in pieces, compared with its digest as it goes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from trimtab.errors import AdapterError
from trimtab.store.manifest import Descriptor
from trimtab.store.remotes.fetch import CHUNK_BYTES, Moved


class Source:
    """The bytes of one blob, any number of times. Its last piece is held back until all of them are what the digest says.

    So a transport that is fed from it never completes an upload of damaged bytes. AdapterError in place of that piece.
    """

    def __init__(self, blob: Descriptor, path: Path, moved: Moved):
        self._blob, self._path, self._moved = blob, path, moved

    def __len__(self) -> int:
        return self._blob.size

    def __iter__(self) -> Iterator[bytes]:
        hasher, held = hashlib.sha256(), b""
        with self._path.open("rb") as file:
            while piece := file.read(CHUNK_BYTES):
                hasher.update(piece)
                if held:
                    yield held
                    self._moved(len(held))
                held = piece
        if f"sha256:{hasher.hexdigest()}" != self._blob.digest:
            raise AdapterError(
                f"the store's blob {self._blob.digest} is damaged and is not pushed", fix="see `trimtab store verify`, and publish anew"
            )
        if held:
            yield held
            self._moved(len(held))
