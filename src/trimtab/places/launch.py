"""Starts the ranks of one machine, by torchrun's own code."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from trimtab.errors import ConfigError

END_S = 600
"""How long ranks may take for the step that runs and its checkpoint, once they are told to end; torchrun's own figure is 30 s."""


def launch(arguments: Sequence[str], ranks: int, max_restarts: int = 0) -> int:
    """Run `python -m trimtab ARGUMENTS` as so many ranks, and return the exit code. max_restarts: how often all of them are started again
    after one has failed. The cores are divided among the ranks unless OMP_NUM_THREADS says otherwise."""
    if "RANK" in os.environ:
        fix = "leave --ranks out: torchrun has started the ranks already"
        raise ConfigError(f"--ranks {ranks} within rank {os.environ['RANK']} of torchrun", fix=fix)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
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
