"""Starts the ranks of one machine, by torchrun's own code."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trimtab.errors import ConfigError

END_S = 600
"""How long ranks may take for the step that runs and its checkpoint, once they are told to end; torchrun's own figure is 30 s."""

ENDED = "TRIMTAB_RANKS_ENDED"
"""Names the file into which the first rank writes the exit code of a run that was ended."""


def launch(arguments: Sequence[str], ranks: int, max_restarts: int = 0) -> int:
    """Run `python -m trimtab ARGUMENTS` as so many ranks, and return the exit code. max_restarts: how often all of them are started again
    after one has failed. The cores are divided among the ranks unless OMP_NUM_THREADS says otherwise."""
    if "RANK" in os.environ:
        fix = "leave --ranks out: torchrun has started the ranks already"
        raise ConfigError(f"--ranks {ranks} within rank {os.environ['RANK']} of torchrun", fix=fix)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    with tempfile.TemporaryDirectory(prefix="trimtab-ranks-") as folder:
        told = Path(folder) / "ended"
        os.environ[ENDED] = str(told)
        try:
            code = _launched(arguments, ranks, max_restarts)
        finally:
            del os.environ[ENDED]
        return int(told.read_text()) if code == 0 and told.exists() else code


def end_of_rank(code: int, first: bool) -> int:
    """The exit code of a rank whose run was ended by an order or a signal, with a checkpoint. For torchrun each other code than 0 is a
    failure, after which it starts the ranks again. first: tells `launch` the code."""
    if first and ENDED in os.environ:
        Path(os.environ[ENDED]).write_text(str(code))
    return 0


def _launched(arguments: Sequence[str], ranks: int, max_restarts: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say themselves what was wrong
    options = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(max_restarts), "--shutdown-timeout", str(END_S)]
    try:
        run(parse_args([*options, "-m", "trimtab", *arguments]))
    except ChildFailedError as error:
        code: int = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as signalled:
        return 128 + int(signalled.sigval)
    return 0
