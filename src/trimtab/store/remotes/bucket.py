"""A folder that fsspec can reach (s3, gs, file, memory, …): files go there whole or not at all, and its libraries' errors come as ours.

A path is relative to the folder. `Transient` is raised for what may succeed later.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.atomic import atomic_write
from trimtab.errors import AdapterError, nearest
from trimtab.store.remotes.address import CREDENTIALS, OTHER_CREDENTIALS, FolderAddress, redacted
from trimtab.store.remotes.fetch import TIMEOUT_S, Transient

RANGE_BYTES = 2**23
"""Asked for at once; what an interrupted download may have to fetch again is less than that."""
FINAL = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
S3 = ("s3", "s3a")
OBJECT_STORES = (*S3, "gs", "gcs", "abfs", "abfss", "az", "adl", "oss")
EXTRAS = {"s3": "pip install 'trimtab[s3]'", "gs": "pip install gcsfs", "gcs": "pip install gcsfs", "abfs": "pip install adlfs"}


class Bucket:
    """address: of the folder. where: what errors call it."""

    def __init__(self, address: FolderAddress):
        self.address, self.where = address, str(address)
        self._fs, self.root = _file_system(address)
        self.local = "file" in ((self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol)

    def size(self, path: str) -> int | None:
        """Of a file, None where there is none."""
        with self._speaking():
            try:
                found = self._fs.info(self._at(path))
            except FileNotFoundError:
                return None
            return found["size"] if found["type"] == "file" else None

    def piece(self, path: str, start: int, end: int) -> bytes:
        """The bytes of a file from `start` to before `end`."""
        with self._speaking():
            return bytes(self._fs.cat_file(self._at(path), start=start, end=end))

    def whole(self, path: str, most: int) -> bytes | None:
        """The first `most` bytes of a file, None where there is none."""
        with self._speaking():
            try:
                return bytes(self._fs.cat_file(self._at(path), start=0, end=most))
            except FileNotFoundError:
                return None

    def files(self) -> list[str]:
        """The paths of all files in the folder and in folders in it."""
        with self._speaking():
            try:
                return [str(path).removeprefix(str(self.root)).lstrip("/") for path in self._fs.find(self.root)]
            except FileNotFoundError:
                return []

    def put(self, path: str, size: int, pieces: Iterable[bytes]) -> None:
        """A file whole or not at all: one request or a transaction, as object stores have them; on this machine's disks a rename."""
        target = self._at(path)
        with self._speaking():
            if self.address.scheme not in OBJECT_STORES:  # there a missing folder would be a missing bucket, and a typing error made one
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            if self.local:
                with atomic_write(Path(target)) as file:
                    file.writelines(pieces)
            elif size <= RANGE_BYTES:
                self._fs.pipe_file(target, b"".join(pieces))
            else:
                with self._fs.transaction, self._fs.open(target, "wb") as file:
                    for piece in pieces:
                        file.write(piece)

    def remove(self, path: str) -> None:
        """A file, if it is there."""
        with self._speaking():
            try:
                self._fs.rm_file(self._at(path))
            except FileNotFoundError:
                return

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """The errors of storage libraries as ours. Bugs of ours (KeyError and the like) pass as they are."""
        try:
            yield
        except (AdapterError, Transient):
            raise
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__ == "builtins":
                raise
            said = f"{type(error).__name__}: {redacted(str(error))}"
            if isinstance(error, PermissionError) or "Credential" in type(error).__name__ or "Profile" in type(error).__name__:
                fix = CREDENTIALS.get(self.address.scheme, OTHER_CREDENTIALS)
                raise AdapterError(f"{self.where}: access is refused ({said})", fix=fix) from error
            if isinstance(error, (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)) or (
                isinstance(error, OSError) and error.errno in FINAL
            ):
                raise AdapterError(f"{self.where}: {said}", fix="see whether the URL is right, and whether there is room") from error
            raise Transient(said) from error


def _file_system(address: FolderAddress) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    try:
        # no listings kept: what another process has pushed since must be seen
        limits = {"connect_timeout": TIMEOUT_S[0], "read_timeout": TIMEOUT_S[1], "retries": {"total_max_attempts": 1}}
        options = {"config_kwargs": limits} if address.scheme in S3 else {}
        files, root = fsspec.core.url_to_fs(address.root, use_listings_cache=False, skip_instance_cache=True, **options)
        if address.scheme in S3:
            files.retries = 1  # s3fs's tries, botocore's and ours would multiply: five minutes for a server that is gone
        return files, root
    except ImportError as error:
        raise AdapterError(
            f"{address}: {address.scheme}:// needs a package that is missing ({error})",
            fix=EXTRAS.get(address.scheme, "install that package"),
        ) from error
    except ValueError as error:
        known = fsspec.available_protocols()
        raise AdapterError(
            f"{address}: {address.scheme}:// is not known{nearest(address.scheme, ['hf', 'oci', *known])}",
            fix="use hf, oci, s3, gs, file or another scheme of fsspec",
        ) from error
