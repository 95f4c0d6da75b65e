"""The Hugging Face hub: an adapter is a plain peft folder in a repository, at a commit.

Pushing leaves everything to `huggingface_hub` (large files, deduplication, retries). Pulling asks it for the commit and its files, then
fetches the few known names itself, at that commit: in ranges, within the sizes that were promised, compared with the digests that git and
its large file storage keep. Whatever else a repository holds is never fetched.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import AdapterError
from trimtab.store.files import MAX_JSON_BYTES
from trimtab.store.folder import NOTE, PICKLES, WEIGHTS
from trimtab.store.manifest import FILE_TYPES, REQUIRED, SMALL_FILES
from trimtab.store.remotes.address import CREDENTIALS, HubAddress, redacted
from trimtab.store.remotes.fetch import CHUNK_BYTES, TIMEOUT_S, Moved, Part, Transient, patiently

if TYPE_CHECKING:
    from trimtab.store.registry import Store, Version

COMMIT, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
BUSY = (408, 429, 500, 502, 503, 504)


class Hub:
    """One repository at one revision. commit: what the revision means, once `parts` has asked."""

    def __init__(self, address: HubAddress):
        self.address, self.where, self.commit = address, str(address), ""

    # ---- reading ----

    def parts(self) -> list[Part]:
        """The adapter's files at the commit that the revision means now. AdapterError if it is no adapter or makes no sense."""
        info = patiently(self._info, self.where)
        if not COMMIT.fullmatch(info.sha or ""):
            raise AdapterError(f"{self.where}: the hub names no commit ({str(info.sha)[:60]!r})", fix="see whether HF_ENDPOINT is right")
        self.commit = info.sha
        there = {s.rfilename: s for s in info.siblings or ()}
        found = [_part(name, there[name]) for name in FILE_TYPES if name in there]
        problems = [f for f in found if isinstance(f, str)]
        problems += [f"{name} is not there" for name in REQUIRED if name not in there]
        if WEIGHTS not in there and (pickles := [n for n in PICKLES if n in there]):
            problems.append(f"{', '.join(pickles)} is a pickle, which can run code when it is read; it never is here")
        if problems:
            fix = "it must hold adapter_config.json and adapter_model.safetensors at its top, as peft's push_to_hub writes them"
            raise AdapterError(f"{self.where} at {self.commit[:12]} is refused", problems=problems, fix=fix)
        return [f for f in found if isinstance(f, Part)]

    def _info(self) -> Any:
        from huggingface_hub import HfApi

        with self._speaking():
            return HfApi().model_info(
                self.address.repository, revision=self.address.revision or None, files_metadata=True, timeout=TIMEOUT_S[1]
            )

    def read(self, part: Part, start: int) -> Iterator[bytes]:
        """A file's bytes from `start` on, at the commit; a server that knows no ranges sends them all, and the first ones are dropped."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.address.repository, part.name, revision=self.commit, endpoint=constants.ENDPOINT)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-{part.size - 1}"} if start else {})
        with self._speaking():
            with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S[1]) as answer:
                if answer.status_code != 200 or start:
                    hf_raise_for_status(answer)
                if answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    raise AdapterError(f"{self.where} answers another range than was asked for", fix="do not trust that server")
                skip = start if answer.status_code == 200 else 0
                for piece in answer.iter_raw():  # as they come: gathered into chunks, a part of one would be lost with the connection
                    yield piece[skip:]
                    skip = max(0, skip - len(piece))

    # ---- writing ----

    def push(self, store: Store, version: Version, begin: Callable[[str, int, int], Moved]) -> str:
        """Upload what differs of a version as one commit, into a repository that is made, private, where there is none. Returns the commit.

        Files of the repository that are no part of an adapter stay as they are.
        """
        if COMMIT.fullmatch(self.address.revision):
            raise AdapterError(f"{self.where}: a commit cannot be pushed to", fix="give a branch, or nothing")
        with tempfile.TemporaryDirectory(prefix="trimtab-push-") as work:
            folder = store.export(version.ref, Path(work) / "adapter")
            info = patiently(self._made, self.where)
            there = {s.rfilename: _part(s.rfilename, s) for s in info.siblings or ()}
            changed = [n for n in version.files if not _same(there.get(n), folder / n)]
            stale = [NOTE] if NOTE in there and NOTE not in version.files else []
            moved = {n: begin(n, blob.size, 0 if n in changed else blob.size) for n, blob in version.files.items()}
            if not changed and not stale:
                return str(info.sha)
            commit = patiently(lambda: self._commit(version, folder, changed, stale), self.where)
            for name in changed:
                moved[name](version.files[name].size)
            return commit

    def _made(self) -> Any:
        """What is in the repository, which is made where there is none, as is the branch."""
        from huggingface_hub import HfApi

        api, repository, revision = HfApi(), self.address.repository, self.address.revision
        with self._speaking():
            if not api.repo_exists(repository):
                api.create_repo(repository, private=True, exist_ok=True)
            if revision:
                api.create_branch(repository, branch=revision, exist_ok=True)
        return self._info()

    def _commit(self, version: Version, folder: Path, changed: list[str], stale: list[str]) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        with self._speaking(), _uploading(self.where):
            commit = HfApi().create_commit(
                self.address.repository,
                [*(CommitOperationAdd(n, str(folder / n)) for n in changed), *(CommitOperationDelete(n) for n in stale)],
                commit_message=f"{version.ref} from trimtab",
                commit_description=f"manifest {version.digest}",
                revision=self.address.revision or None,
            )
        return str(commit.oid)

    # ---- speaking ----

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """huggingface_hub's and its HTTP library's errors as ours; that library's name differs between versions, its errors' do not."""
        from huggingface_hub import errors

        try:
            yield
        except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
            fix = f"see whether the name is right; where it is private or gated, {CREDENTIALS['hf']}"
            raise AdapterError(f"{self.where}: no such repository, or none that you may see", fix=fix) from error
        except errors.RevisionNotFoundError as error:
            raise AdapterError(f"{self.where}: the repository has no such revision", fix="give a branch, a tag or a commit") from error
        except errors.OfflineModeIsEnabled as error:
            raise AdapterError(f"{self.where}: HF_HUB_OFFLINE is set, so the hub is not asked", fix="unset it") from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status in BUSY:
                raise Transient(f"the hub answers {status}") from error
            fix = CREDENTIALS["hf"] if status in (401, 403) else "see whether the name and the revision are right"
            raise AdapterError(f"{self.where}: the hub answers {status}: {_said(error)}", fix=fix) from error
        except Exception as error:
            kinds = {c.__name__ for c in type(error).__mro__}
            if "TooManyRedirects" in kinds:
                raise AdapterError(f"{self.where}: too many redirects", fix="see whether HF_ENDPOINT is right") from error
            if "TransportError" in kinds:  # cut connections, time-outs, broken protocol
                raise Transient(f"{type(error).__name__}: {error}") from error
            raise


def _part(name: str, sibling: Any) -> Part | str:
    """What is promised of one file, or why it is refused."""
    size, lfs, blob = sibling.size, sibling.lfs, sibling.blob_id
    if type(size) is not int or size < 0:
        return f"{name} has no size"
    if name in SMALL_FILES and size > MAX_JSON_BYTES:
        return f"{name} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read"
    sha256 = getattr(lfs, "sha256", None)
    if isinstance(sha256, str) and SHA256.fullmatch(sha256):
        return Part(name, f"sha256:{sha256}", size)
    if lfs is None and isinstance(blob, str) and COMMIT.fullmatch(blob):
        return Part(name, f"git:{blob}", size)
    return f"{name} has no digest"


def _same(part: Part | str | None, path: Path) -> bool:
    """Whether a file here is what the hub has."""
    if not isinstance(part, Part) or part.size != path.stat().st_size:
        return False
    hasher = part.hasher()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            hasher.update(piece)
    return part.digest.partition(":")[2] == hasher.hexdigest()


@contextmanager
def _uploading(where: str) -> Iterator[None]:
    """What huggingface_hub says in exceptions of Python's own: a card whose front matter is no YAML, an upload that failed."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silence = not are_progress_bars_disabled() and not sys.stderr.isatty()
    if silence:
        disable_progress_bars()
    try:
        yield
    except (ValueError, RuntimeError) as error:
        said = _said(error) + (f" {_said(error.__cause__)}" if isinstance(error, RuntimeError) and error.__cause__ else "")
        raise AdapterError(f"{where}: the hub does not take it: {said}", fix="mend what it names, or push again") from error
    finally:
        if silence:
            enable_progress_bars()


def _said(error: BaseException) -> str:
    """What an exception says, on one line and not too long, without secrets."""
    return redacted(" ".join(str(error).split()))[:300] or type(error).__name__
