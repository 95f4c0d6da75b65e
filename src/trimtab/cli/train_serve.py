"""`trimtab train --serve`: the variants of a run, asked over HTTP while they train: in the run's process, on its base, for this machine.

One thread computes, the one that trains: between two joint steps it takes snapshots of the variants and drives the engine. So no lock is
needed, no forward meets another, the teams of threads of two forwards do not fight over the cores, and a run that is asked gives the very
numbers of one that is not. The price is time: a request waits for the step that runs (and the validation or checkpoint after it), and while
there are requests, training and serving take turns of equal length.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from trimtab.cli.serve import PACKAGES
from trimtab.errors import ConfigError
from trimtab.http import server
from trimtab.http.app import create_app
from trimtab.http.assemble import Asked, services_of
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.serve.live import Snapshot, snapshot
from trimtab.serve.request import FinishReason, Request, Usage
from trimtab.serve.runner import Runner
from trimtab.serve.tenant import LOCAL
from trimtab.train.full import FullVariant
from trimtab.train.listen import Beside, Listener
from trimtab.train.prepare import Prepared

HOST = "127.0.0.1"
RUNNING, TOKENS = 16, 1024
"""Answers at a time, and tokens of each that the KV blocks have room for: memory is for training first, and known beforehand."""
SNAPSHOT_SHARE = 0.05
"""Of the time, for taking snapshots: after each step where they are cheap, less often where there is much to copy and to hash."""
DRAIN_S = 10.0
"""After the last step, for running answers; scores and files wait for them."""

log = logging.getLogger(__name__)
