"""A file beside the run folder, or in its bucket, by which a node shows that it sees what the driver sees."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from trimtab.errors import AdapterError, ConfigError
from trimtab.paths import is_url
from trimtab.store.remotes.bucket import Bucket
from trimtab.store.remotes.fetch import patiently
from trimtab.store.remotes.snapshot import folder_address
from trimtab.train.config import RunConfig


class Marker:
    """Written by the driver. where: for `seen` on a node. ConfigError where it cannot be written."""

    def __init__(self, run: RunConfig):
        name = f".seen.{os.urandom(6).hex()}.new"  # `is_unfinished`, so that it is in nobody's way, should it stay
        self._bucket = Bucket(folder_address(run.url)) if run.url else None
        folder = run.out.absolute().parent
        self.where = f"{run.url}/{name}" if run.url else str(folder / name)
        try:
            if self._bucket is not None:
                bucket = self._bucket
                patiently(lambda: bucket.put(name, 0, [b""]), bucket.where)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                Path(self.where).touch()
        except (OSError, AdapterError) as error:
            reason = error.message if isinstance(error, AdapterError) else f"cannot write into {folder}: {error.strerror}"
            raise ConfigError(reason, fix="name a folder that can be written in `out`") from None

    def remove(self) -> None:
        """If that cannot be done, it stays."""
        if self._bucket is not None:
            bucket, name = self._bucket, self.where.rpartition("/")[2]
            with suppress(AdapterError):
                patiently(lambda: bucket.remove(name), bucket.where)
        else:
            Path(self.where).unlink(missing_ok=True)


def unseen(where: str) -> str | None:
    """Why this node does not see the marker, None where it does."""
    folder, _, name = where.rpartition("/")
    if is_url(where):
        try:
            bucket = Bucket(folder_address(folder))
            there = patiently(lambda: bucket.size(name), bucket.where) is not None
        except AdapterError as error:
            return f"it does not reach {folder}: {error.message}"
        return None if there else f"what it sees at {folder} is not what the driver sees there"
    return None if Path(where).exists() else f"it does not see {folder}, where the run writes: this must be a folder that all nodes share"
