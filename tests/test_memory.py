"""Memory that runs out is told as such: what was done, how much was asked for, what would fit. The errors are real ones."""

from __future__ import annotations

import errno
import gc
import json
import resource
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from tests.train.common import METHODS, run_file, tiny_base
from trimtab import memory, model
from trimtab.cli import main
from trimtab.errors import ConfigError, TrimtabError
from trimtab.memory import OutOfMemory, asked_bytes, explained, free_bytes, ran_out, release_mapped, without_full_collections
from trimtab.train import RunConfig, train

HUGE = 2**50


def torch_error() -> BaseException:
    try:
        torch.empty(HUGE, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError


def numpy_error() -> BaseException:
    try:
        np.ones(HUGE, dtype=np.uint8)
    except MemoryError as error:
        return error
    raise AssertionError


def test_each_kind_is_known_and_says_how_much() -> None:
    assert ran_out(torch_error()) and asked_bytes(torch_error()) == HUGE
    assert ran_out(numpy_error()) and asked_bytes(numpy_error()) == HUGE
    assert ran_out(MemoryError()) and asked_bytes(MemoryError()) is None
    assert ran_out(RuntimeError("std::bad_alloc")) and ran_out(OSError(errno.ENOMEM, "Cannot allocate memory"))
    cuda = RuntimeError("CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity of 139 GiB")
    assert ran_out(cuda) and asked_bytes(cuda) == int(20.5 * 2**20)
    for other in (RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space"), ValueError("x"), KeyError("memory")):
        assert not ran_out(other)
    wrapped = ValueError("could not load")
    wrapped.__cause__ = torch_error()
    assert ran_out(wrapped)


ONEDNN = """
import mmap, resource, psutil, torch
from trimtab.memory import ran_out

linear, W = torch.nn.functional.linear, torch.ones(64, 64, dtype=torch.bfloat16)
rows = [torch.ones(n, 64, dtype=torch.bfloat16) for n in range(100, 140)]
linear(rows[0][:7], W)
spare, top = [bytearray(50_000) for _ in range(200)], bytearray(50_000)
del spare  # the heap has room for what torch itself asks for
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**20,) * 2)
kept = []
for size in (2**16, 2**14, 2**12):
    try:
        while True:
            kept.append(mmap.mmap(-1, size))
    except OSError:
        pass
try:
    for x in rows:
        linear(x, W)
except RuntimeError as error:
    kept.clear()
    print(ran_out(error), error)
"""


@pytest.mark.skipif(sys.platform != "linux" or not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no oneDNN for bfloat16")
def test_onednn_has_words_of_its_own() -> None:
    """It has no room for the code of its kernels, and does not say so."""
    ran = subprocess.run([sys.executable, "-c", ONEDNN], check=True, capture_output=True, text=True)
    assert ran.stdout.startswith("True could not"), ran.stdout
    assert not ran_out(RuntimeError("could not create a primitive descriptor for the matmul primitive. Run workload with"))


def test_explained() -> None:
    with pytest.raises(
        OutOfMemory, match=r"memory ran out while baking: 1\.13e\+06 GB were asked for at once, .* GB are free\nfix: less flour"
    ):
        with explained("baking", lambda: "less flour"):
            torch.empty(HUGE, dtype=torch.uint8)
    with pytest.raises(ValueError, match="other"), explained("baking", "x"):
        raise ValueError("other")
    with pytest.raises(ConfigError), explained("baking", "x"):
        raise ConfigError("not enough memory in the file's name")
    assert 0 < free_bytes() < 2**50


def test_loading(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def load(*_: Any, **__: Any) -> None:
        torch.empty(HUGE, dtype=torch.uint8)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(OutOfMemory, match="while loading the base") as caught:
        model.load_base(str(tiny_llama_folder))
    numbers = tiny_base().spec.num_parameters
    assert f"{numbers * 4 / 1e9:.3g} GB in float32" in caught.value.fix and f"{numbers * 2 / 1e9:.3g} GB in bfloat16" in caught.value.fix
    assert "causal language model" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("trimtab.train.loop.run_step", "while training, after step 0: "),
        ("trimtab.train.validate.Validator._judge", "while validating, after step 0: "),
        ("trimtab.train.loop.evaluate", "while scoring on held-out rows, after step 2: "),
        ("trimtab.train.loop.prepare", "while reading rows and making the variants: "),
    ],
)
@pytest.mark.parametrize("error", [torch_error, numpy_error, lambda: RuntimeError("std::bad_alloc")])
def test_a_run_says_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, words: str, error: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error()

    content = run_file(tmp_path, {"v": METHODS["lora"] | {"data": "a", "max_steps": 2, "eval_every": 1}}, checkpoint_every=1)
    content["data"]["a"]["valid"] = "a-test.jsonl"
    run = RunConfig.from_dict(content, root=tmp_path)
    monkeypatch.setattr(where, fail)
    with pytest.raises(OutOfMemory) as caught:
        train(run, base=tiny_base())
    said = str(caught.value)
    assert words in said and "GB are free" in said
    if "after step" in words:
        assert "max_tokens is 4096; what takes less: a run with max_tokens: 2048" in said and "activation_checkpointing: true" in said
    if "step 2" in words:
        assert "step-00000002" in said  # what goes on from where it stopped
    monkeypatch.undo()
    assert train(run, base=tiny_base(), resume=True).summary["variants"]["v"]["steps"] == 2


def test_any_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch_error()

    monkeypatch.setattr("trimtab.bases.shapes.read_architecture", fail)
    shown = CliRunner().invoke(main, ["plan", "gpt2"])
    assert shown.exit_code == 2 and "memory ran out while running `trimtab plan`" in shown.output and "Traceback" not in shown.output


@pytest.mark.slow
def test_a_process_that_may_not_have_more(tmp_path: Path, tiny_llama_folder: Path) -> None:
    """A step whose activations do not fit the process's limit, as the system refuses them."""
    content = run_file(tmp_path, {"v": METHODS["lora"] | {"data": "a", "batch_size": 600, "max_length": 512, "max_steps": 1}})
    content |= {"base": str(tiny_llama_folder), "dtype": "float32", "max_tokens": 400_000, "data": {"a": {"train": "long.jsonl"}}}
    row = {"messages": [{"role": "user", "content": "x" * 400}, {"role": "assistant", "content": "y" * 40}]}
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(600)))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    script = (
        "import resource, psutil, sys\n"
        "import trimtab.train\n"
        "from trimtab.cli import main\n"
        "import trimtab.train.loop as loop\n"
        "begin = loop._steps\n"
        "def limited(*a):\n"
        f"    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28, {resource.RLIM_INFINITY}))\n"
        "    begin(*a)\n"
        "loop._steps = limited\n"
        f"main(['train', {str(tmp_path / 'run.yaml')!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "memory ran out while training, after step 0" in done.stderr and "what takes less" in done.stderr
    assert "Traceback" not in done.stderr
    assert isinstance(OutOfMemory("x"), TrimtabError)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_memory_of_a_real_run_is_within_the_estimate(tmp_path: Path, method: str) -> None:
    """The peak of a process that trains, validates and scores on the bundled base, as the system counts it, with a generous band."""
    from tests.tiny import bundled_base

    bundled_base()
    rows = [{"prompt": f"How do I do task number {i}? " + "Tell me more. " * 20, "completion": f"Open page {i}."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    fields = {"data": "a", "method": method, "max_steps": 2, "batch_size": 6, "eval_every": 1, "valid_metric": "exact_match"}
    data = {"a": dict.fromkeys(("train", "valid", "test"), "rows.jsonl")}
    content = {"base": "smollm2-135m-instruct", "out": "out", "data": data, "variants": {"v": fields}}
    content |= {"evaluate": {"max_new_tokens": 8, "max_rows": 4}}
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    script = (
        "import json, sys\n"
        "from trimtab.memory import peak_resident_bytes\n"
        "from trimtab.train import train\n"
        "from trimtab.train.check import check\n"
        "e = check(sys.argv[1], rows=0).estimate\n"
        "train(sys.argv[1])\n"
        "print(json.dumps([*e.memory_bytes, e.process_bytes, peak_resident_bytes()]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run.yaml")], capture_output=True, text=True, timeout=900)
    least, most, process, peak = json.loads(done.stdout.splitlines()[-1])
    assert 0.7 * (least + process) <= peak <= 1.1 * (most + process), (least, most, process, peak)


def test_the_peak_of_a_process_is_not_that_of_the_one_which_started_it() -> None:
    held = np.ones(2**27, dtype=np.uint8)  # 134 MB in this process alone
    script = (
        "import numpy as np; from trimtab.memory import peak_resident_bytes as p; a = p(); np.ones(10**8, dtype=np.uint8); print(a, p())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    before, after = map(int, done.stdout.split())
    assert before < held.nbytes and 0.9e8 < after - before < 1.1e8, (before, after)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages are a file's")
def test_pages_of_a_mapped_file_are_released_unless_they_were_written_to(tmp_path: Path) -> None:
    numbers = 64 * resource.getpagesize() // 4
    (tmp_path / "numbers").write_bytes(np.arange(numbers, dtype=np.int32).tobytes())
    mapped = torch.from_file(str(tmp_path / "numbers"), shared=False, size=numbers, dtype=torch.int32)
    own = mapped.clone()
    assert release_mapped(mapped.data_ptr(), mapped.nbytes) > mapped.nbytes // 2
    assert resident(mapped) == 0
    assert torch.equal(mapped, own)  # read from the file again
    assert release_mapped(own.data_ptr(), own.nbytes) == 0
    mapped[5] = -1
    assert release_mapped(mapped.data_ptr(), mapped.nbytes) == 0
    own[5] = -1
    assert torch.equal(mapped, own)


def resident(tensor: torch.Tensor) -> int:
    """Bytes of a mapped tensor that are in this process's memory, as the system tells it."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{tensor.data_ptr():x}-"))
    return 1024 * int(next(line.split()[1] for line in lines[at:] if line.startswith("Rss:")))


class _Ring:
    def __init__(self) -> None:
        self.me = self


def test_rings_of_objects_are_found_without_looking_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python's own collector reports it: while rows are read, only young objects are looked at, and rings among them are freed."""
    looked: list[int] = []
    note = lambda phase, info: looked.append(info["generation"]) if phase == "start" else None  # noqa: E731
    monkeypatch.setattr(memory, "YOUNG", 1000)
    assert gc.isenabled()
    gc.callbacks.append(note)
    try:
        with without_full_collections() as collect:
            last = weakref.ref(_Ring())
            kept = [[i] for i in range(200_000)]  # by itself the collector would have looked hundreds of times
            assert not looked and last() is not None
            collect()
            assert looked == [1] and last() is None
            collect()
            assert looked == [1]
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled() and len(kept) == 200_000


def test_the_collector_is_as_it_was_afterwards() -> None:
    """Behind an error, behind blocks that end in another order than they began in, and where the user has turned it off."""
    with pytest.raises(KeyError), without_full_collections():
        raise KeyError
    assert gc.isenabled()
    first, second = without_full_collections(), without_full_collections()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()
    gc.disable()
    try:
        with without_full_collections() as collect:
            collect()
        assert not gc.isenabled()
    finally:
        gc.enable()
