"""Real trainings that are killed, or whose disk is full, at a moment of one's choosing; then resumed and compared bit for bit.

A server process imports everything once, trains once, and forks for each training: a fork runs the real command line (`trimtab train
RUN.yaml --resume --json`) on a tiny base from its folder, in 0.4 s of CPU instead of the ten of a cold start, and SIGKILL ends it as it
would any process.

By hand: python -m tests.train.kill_harness 50
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TIMING = {"seconds", "tokens_per_s", "peak_memory_gb"}
ROOM = ("fsync", "replace", "rename", "mkdir")
CALLS = (*ROOM, "unlink", "rmdir")
"""Functions of `os` that change what is on disk for good; ROOM: those that may find it full. A fault strikes at the n-th call of them."""


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th call (from 1): "kill", of CALLS, or "enospc", of ROOM."""

    kind: str
    at: int


@dataclass
class Attempt:
    """A training that has ended. code: its exit code, negative for a signal. calls: how many of CALLS and of ROOM it made, if it lived."""

    code: int
    output: str
    calls: list[int]


@dataclass
class Tally:
    """kills: trainings that died. resumable: those of them that left a checkpoint. finished: runs that came to their end after these.
    unequal: those whose files differ from the uninterrupted run's. corrupt: checkpoints under a step's name that did not verify after a
    kill. lost: kills after which the newest checkpoint was older than one seen before."""

    kills: int = 0
    resumable: int = 0
    finished: int = 0
    unequal: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def report(self) -> str:
        equal = self.finished - len(self.unequal)
        return (
            f"kills {self.kills}, {self.resumable} of them with a checkpoint to go on from; lost {len(self.lost)}, corrupt accepted "
            f"{len(self.corrupt)}, bit-equal {equal} of {self.finished} finished runs"
        )

    @property
    def clean(self) -> bool:
        return not (self.unequal or self.corrupt or self.lost)


class Server:
    """Forks trainings of the run that `take` has written. `start` gives a process id at once, `wait` what became of it."""

    def __init__(self, folder: Path, base: Path):
        self._base = base
        paths = f"{ROOT / 'src'}:{ROOT}"
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRIMTAB_CACHE": str(folder / "cache"), "PYTHONPATH": paths}
        self.take(folder / "first", short=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.kill_harness", "serve", str(self.run_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | environment,
            text=True,
        )
        assert self._read() == "ready\n"

    def take(self, folder: Path, short: bool) -> None:
        """From now on the trainings are of this run."""
        self.folder = folder
        self.run_file = write_run(folder, short, base=str(self._base), dtype="float32", device="cpu")

    def start(self, out: Path, *, fault: Fault | None = None, gate: Path | None = None) -> int:
        """Fork a training into `out`. gate: a file that it waits for, so that a tracer has time to attach."""
        order = {"run": str(self.run_file), "out": str(out), "log": str(self.folder / "log"), "gate": str(gate) if gate else None}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order | {"fault": asdict(fault) if fault else None}) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def wait(self) -> Attempt:
        code = int(self._read())
        calls = self.folder / "log.calls"
        written = calls.read_text() if calls.exists() else ""
        whole = written.endswith("]")  # not where the kill came while it was written
        return Attempt(code, (self.folder / "log").read_text(errors="replace"), json.loads(written) if whole else [])

    def run(self, out: Path, fault: Fault | None = None) -> Attempt:
        self.start(out, fault=fault)
        return self.wait()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server has died"
        return line


@contextmanager
def server(folder: Path, base: Path) -> Iterator[Server]:
    found = Server(folder, base)
    try:
        yield found
    finally:
        found.close()


def write_run(folder: Path, short: bool, **keys: Any) -> Path:
    """A run that has all that a checkpoint must hold: dropout, several lengths of run, accumulation, validation with early stopping and
    best tensors, full fine-tuning. short: little of it, for a run at each of its calls."""
    from tests.train.common import METHODS, run_file, write_rows

    steep = METHODS["lora"] | {"data": "b", "schedule": "constant", "warmup_steps": 0, "eval_every": 1}
    variants = {
        "best": steep | {"lr": 0.2, "max_steps": 11},  # validates best at step 2
        "early": steep | {"lr": 0.1, "max_steps": 16, "patience": 3},  # ends at step 5
        "plus": METHODS["lora"] | {"data": "a", "max_steps": 16, "eval_every": 3, "loraplus_lr_ratio": 4.0},
        "prompt": METHODS["prompt"] | {"data": "a", "max_steps": 9, "gradient_accumulation_steps": 2, "seed": 7},
        "full": METHODS["full"] | {"data": "b", "max_steps": 5, "keep_best": False},
    }
    if short:
        variants = {"best": variants["best"] | {"max_steps": 5}, "prompt": variants["prompt"] | {"max_steps": 3}}
    run = run_file(folder, variants, checkpoint_every=2, keep_checkpoints=1 + (not short), **keys)
    for name in "ab":
        write_rows(folder / f"{name}-valid.jsonl", 3, name)
        run["data"][name]["valid"] = f"{name}-valid.jsonl"
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def results(out: Path) -> dict[str, Any]:
    """All that a run leaves and that must not depend on interruptions: tensors byte for byte, metrics and summary without times."""
    found: dict[str, Any] = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("adapters/*/*.safetensors"))}
    found["metrics"] = [_untimed(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["summary"] = _untimed(json.loads((out / "summary.json").read_text()))
    found["predictions"] = {p.name: p.read_bytes() for p in sorted(out.glob("predictions/**/*")) if p.is_file()}
    found["left over"] = [str(p.relative_to(out)) for p in out.rglob(".*")]
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> str:
    return ", ".join(k for k in {**expected, **found} if expected.get(k) != found.get(k))


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if k not in TIMING}
    return value


def examine(out: Path, tally: Tally, newest: int, what: str) -> int:
    """After a death: every checkpoint under its name verifies, and none has been lost. Returns the newest one's step."""
    from trimtab.train.checkpoint import Damaged, newest_checkpoint, steps_of

    try:
        found = newest_checkpoint(out)
    except Damaged as reason:
        tally.corrupt.append(f"{what}: {reason}")
        return newest
    if found is not None and found.rejected:
        tally.corrupt.append(f"{what}: {found.rejected}")
    step = found.moment.step if found else 0
    tally.resumable += found is not None
    if step < newest:
        tally.lost.append(f"{what}: {[p.name for p in steps_of(out)]}, and step {newest} was there")
    return max(step, newest)


def compare(out: Path, reference: dict[str, Any], tally: Tally, what: str) -> None:
    tally.finished += 1
    if different := differences(reference, results(out)):
        tally.unequal.append(f"{what}: {different}")


def uninterrupted(trainings: Server, folder: Path) -> dict[str, Any]:
    done = trainings.run(folder / "reference")
    assert done.code == 0, done.output
    return results(folder / "reference")


def kill_at_random(trainings: Server, folder: Path, kills: int, seed: int = 0, report: Callable[[Tally], None] = lambda t: None) -> Tally:
    """Kill at random moments, resume until finished, compare, and begin anew until there have been `kills` kills. A moment is told in the
    training's own processor time, so that what else the machine does moves none."""
    draw, reference, tally, n = random.Random(seed), uninterrupted(trainings, folder), Tally(), 0
    whole = _until(trainings.start(folder / "timed"), math.inf)
    trainings.wait()
    while tally.kills < kills:
        out, newest, died = folder / f"run-{n}", 0, True
        while died:
            pid = trainings.start(out)
            if tally.kills < kills:
                _until(pid, draw.uniform(0, 1.2 * whole))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            attempt = trainings.wait()
            died = attempt.code == -signal.SIGKILL
            tally.kills += died
            if died:
                newest = examine(out, tally, newest, f"run {n}, kill {tally.kills}")
        assert attempt.code == 0, attempt.output
        compare(out, reference, tally, f"run {n}")
        report(tally)
        n += 1
    return tally


def _until(pid: int, seconds: float) -> float:
    """Wait until a process has used this much processor time, or has ended. Returns what it has used."""
    used = 0.0
    with suppress(FileNotFoundError, ProcessLookupError):
        while used < seconds:
            state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if state == "Z":
                break
            used = (int(numbers[10]) + int(numbers[11])) / os.sysconf("SC_CLK_TCK")
            time.sleep(0.002)
    return used


def kill_at_calls(trainings: Server, folder: Path) -> tuple[Tally, int]:
    """Kill before each call of CALLS, a run for each; resume, compare. Returns also how many calls a whole run makes."""
    reference, tally = uninterrupted(trainings, folder), Tally()
    calls = trainings.run(folder / "counted").calls[0]
    for at in range(1, calls + 1):
        out, what = folder / f"run-{at}", f"killed at call {at}"
        attempt = trainings.run(out, Fault("kill", at))
        assert attempt.code == -signal.SIGKILL, attempt.output
        recover(trainings, out, attempt, reference, tally, what)
    return tally, calls


def fill_disk_at_calls(trainings: Server, folder: Path) -> tuple[Tally, list[int]]:
    """A full disk at each call of CALLS, a run for each. Returns also the exit codes: 0 where the run went on, 2 where it said
    what is saved; those are resumed."""
    reference, tally, codes = uninterrupted(trainings, folder), Tally(), []
    calls = trainings.run(folder / "counted").calls[1]
    for at in range(1, calls + 1):
        out, what = folder / f"run-{at}", f"disk full at call {at}"
        attempt = trainings.run(out, Fault("enospc", at))
        codes.append(attempt.code)
        recover(trainings, out, attempt, reference, tally, what)
    return tally, codes


def recover(trainings: Server, out: Path, attempt: Attempt, reference: dict[str, Any], tally: Tally, what: str) -> None:
    """After a training that died, went on, or ended with an error of ours: check what is there, resume if there is more to do, compare."""
    assert attempt.code in (0, 2, -signal.SIGKILL) and "Traceback" not in attempt.output, f"{what}: {attempt.output}"
    tally.kills += attempt.code == -signal.SIGKILL
    examine(out, tally, 0, what)
    if attempt.code:
        again = trainings.run(out)
        assert again.code == 0, f"{what}: {attempt.output}, then {again.output}"
    compare(out, reference, tally, what)


def trace(trainings: Server, folder: Path, call: str, fault: str, most: int) -> Tally:
    """With strace: a fault ("signal=KILL", "error=ENOSPC") at the system calls `call` themselves, at `most` of them, evenly spread."""
    reference, tally = uninterrupted(trainings, folder), Tally()
    trainings_of = folder / f"{call}-{fault.partition('=')[2]}"
    _, lines = _traced(trainings, trainings_of / "counted", [f"trace={call}"])
    calls = [line for line in lines if f"{call}(" in line]
    # what the command prints is its user's pipe or terminal, not the run folder
    places = [at for at, line in enumerate(calls, 1) if not _prints(line)]
    assert places
    for at in places[:: max(1, -(-len(places) // most))]:
        out, what = trainings_of / f"run-{at}", f"{call} {at} of {len(calls)}, {fault}"
        attempt, lines = _traced(trainings, out, [f"trace={call}", f"inject={call}:{fault}:when={at}"])
        if any("(INJECTED)" in line and _prints(line) for line in lines):
            continue  # this run wrote once more or less before than the counted one
        recover(trainings, out, attempt, reference, tally, what)
    return tally


def _prints(line: str) -> bool:
    """Whether a line of strace's is a write to standard output or error."""
    return any(f"write({fd}," in line for fd in (1, 2))


def _traced(trainings: Server, out: Path, expressions: list[str]) -> tuple[Attempt, list[str]]:
    """A training under strace, which attaches before it begins; and strace's lines."""
    out.parent.mkdir(exist_ok=True)
    gate, log = out.with_name(out.name + ".gate"), out.with_name(out.name + ".strace")
    pid = trainings.start(out, gate=gate)
    options = [o for e in expressions for o in ("-e", e)]
    tracer = subprocess.Popen(["strace", "-f", "-o", str(log), *options, "-p", str(pid)], stderr=subprocess.DEVNULL)
    while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
        assert tracer.poll() is None, "strace cannot attach"
        time.sleep(0.01)
    gate.touch()
    attempt = trainings.wait()
    tracer.wait()
    return attempt, log.read_text().splitlines()


def serve(first: str) -> None:
    """The server: one order a line, answered by the fork's process id, and by its exit code when it has ended."""
    import torch

    from trimtab.cli import main

    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):  # what this one training imports and compiles, no fork has to
        main(["train", first, "--json"], standalone_mode=False)
    print("ready", flush=True)
    zombie = None
    for line in sys.stdin:
        if zombie is not None:
            os.waitpid(zombie, 0)
        order = json.loads(line)
        calls = Path(order["log"] + ".calls")
        calls.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            _train(order, calls)
        print(pid, flush=True)
        # WNOWAIT: the id stays the fork's, a zombie's, until the next order: the harness may be about to kill it
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)
        zombie = pid


def _train(order: dict[str, Any], calls: Path) -> None:
    """In the fork: the command line, with the fault planted."""
    from trimtab.cli import main

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    while order["gate"] and not Path(order["gate"]).exists():
        time.sleep(0.01)
    count = _plant(order["fault"])
    code = 70  # a traceback: a bug of ours
    try:
        main(["train", order["run"], "--out", order["out"], "--resume", "--json"])
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        calls.write_text(json.dumps([count["kill"], count["enospc"]]))
    except OSError:  # a planted fault that struck the harness's own write, after the run
        calls.unlink(missing_ok=True)
    os._exit(code)


def _plant(fault: dict[str, Any] | None) -> dict[str, int]:
    """Count CALLS and ROOM by the fault that they can have, and let ours strike. Returns the counts, which go on."""
    count = {"kill": 0, "enospc": 0}

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            count["kill"] += 1
            count["enospc"] += name in ROOM
            if fault == {"kind": "kill", "at": count["kill"]}:
                os.kill(os.getpid(), signal.SIGKILL)
            if name in ROOM and fault == {"kind": "enospc", "at": count["enospc"]}:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **kwargs)

        return counting

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    return count


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        from tests.tiny import tiny_folder

        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            with server(place, tiny_folder(place / "base")) as trainings:
                trainings.take(place / "random", short=False)
                found = kill_at_random(trainings, place, int(sys.argv[1]), report=print)
        print(found.report)
        sys.exit(not found.clean)
