"""Tokenised rows on disk, so that the next run, or a run after a crash, need not tokenise again (LlamaFactory#3939).

Each source has one .npz file. Its name is the digest of everything that decides the tokens: rows, tokenizer, template, options. Origins are
not kept, since the same rows may be in another file next time. A file that does not verify is ignored and written again. If a file cannot
be written, the only loss is that the rows are tokenised again.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from trimtab.atomic import atomic_write
from trimtab.bases.cache import cache_dir
from trimtab.data.render import Example
from trimtab.data.rows import Dropped, Row


def token_file(digest: str) -> Path:
    """Where the tokens of a source with this "sha256:…" lie."""
    return cache_dir() / "tokens" / f"{digest.removeprefix('sha256:')}.npz"


def load_tokens(digest: str, rows: Sequence[Row]) -> list[Example | Dropped] | None:
    """What `save_tokens` kept for these rows, or None if there is nothing or it does not verify (zip's CRC, counts, digest)."""
    try:
        # opened here: np.load leaves its own file open where the zip is broken
        with token_file(digest).open("rb") as file, np.load(file, allow_pickle=False) as kept:
            ids, supervised, lengths = kept["ids"], kept["supervised"], kept["lengths"]
            notes = json.loads(kept["notes"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    reasons = notes.get("reasons") if isinstance(notes, dict) and notes.get("digest") == digest else None
    whole = ids.dtype == np.int32 and supervised.dtype == bool and lengths.dtype == np.int64 and ids.ndim == lengths.ndim == 1
    if (
        not isinstance(reasons, dict)
        or not whole
        or len(lengths) != len(rows)
        or ids.shape != supervised.shape
        or lengths.sum() != len(ids)
    ):
        return None
    results: list[Example | Dropped] = []
    stops = np.cumsum(lengths)
    for i, row in enumerate(rows):
        at = slice(int(stops[i] - lengths[i]), int(stops[i]))
        reason = reasons.get(str(i))
        results.append(Example(ids[at], supervised[at], row.origin, row.id) if reason is None else Dropped(row.origin, str(reason)))
    return results


def save_tokens(digest: str, results: Sequence[Example | Dropped]) -> None:
    """Keep what became of each row: a new file, there whole or not at all."""
    examples = [r for r in results if isinstance(r, Example)]
    reasons = {str(i): r.reason for i, r in enumerate(results) if isinstance(r, Dropped)}
    notes = json.dumps({"digest": digest, "reasons": reasons}).encode()
    file = token_file(digest)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as out:
            np.savez(
                out,
                ids=np.concatenate([np.empty(0, np.int32), *(e.ids for e in examples)]),
                supervised=np.concatenate([np.empty(0, bool), *(e.supervised for e in examples)]),
                lengths=np.array([len(r.ids) if isinstance(r, Example) else 0 for r in results], dtype=np.int64),
                notes=np.frombuffer(notes, dtype=np.uint8),
            )
