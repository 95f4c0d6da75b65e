"""What is set before torch is imported, and what a command's process leaves out. Fresh processes: what is imported stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
FORKING = """
import os, sys, trimtab.startup
trimtab.startup.quick()
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import deepgemm  # which decorates with the compiler's decorators
from transformers.models.llama import modeling_llama
from tests.tiny import tiny_model

def loaded():
    return "torch._dynamo.eval_frame" in sys.modules

def nothing_compiled():
    model = tiny_model("llama")
    logits = model(torch.tensor([[1, 2, 3]])).logits
    logits.sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    optimizer.zero_grad()  # one of torch's own functions that are not compiled

def a_compiled_function():
    x = torch.arange(3.0)
    @torch.compiler.disable
    def alone(x):
        return x + 1 if not torch.compiler.is_compiling() else x + 100
    @torch.compiler.allow_in_graph
    def inside(x):
        return x * 2
    @torch._dynamo.assume_constant_result
    def constant():
        return 3
    assert torch.equal(alone(x), x + 1) and not loaded()
    graphs = []
    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward
    found = torch.compile(lambda x: inside(alone(x.cos())) + constant(), backend=backend)(x)
    assert torch.equal(found, (x.cos() + 1) * 2 + 3) and loaded(), found
    assert len(graphs) == 2 and "inside" in graphs[1][0], graphs  # `alone` parts them, `inside` is one call
    assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.allow_in_graph is not None

def a_file_of_the_compiler():
    import torch._dynamo.utils as utils
    from torch._dynamo import config, _trace_wrapped_higher_order_op as file
    assert loaded() and utils.counters is torch._dynamo.utils.counters and torch._dynamo._trace_wrapped_higher_order_op is file
    assert utils is sys.modules["torch._dynamo.utils"] and utils.__spec__.origin == utils.__file__
    assert utils.counters is torch._dynamo.convert_frame.counters  # the file was executed once
    assert not [f for f in sys.meta_path if type(f).__module__ == "trimtab.startup"]

def a_file_that_the_compiler_leaves_out():
    import torch._dynamo.profiler as file
    assert loaded() and file is torch._dynamo.profiler

assert not loaded()
for case in (nothing_compiled, a_compiled_function, a_file_of_the_compiler, a_file_that_the_compiler_leaves_out):
    if (pid := os.fork()) == 0:
        case()
        print(case.__name__, loaded(), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


@pytest.mark.slow
def test_the_compiler_is_loaded_by_those_who_use_it() -> None:
    paths = f"{SOURCE}:{SOURCE.parent}"
    done = subprocess.run(
        [sys.executable, "-c", FORKING], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=240
    )
    loaded = {
        "nothing_compiled": False,
        "a_compiled_function": True,
        "a_file_of_the_compiler": True,
        "a_file_that_the_compiler_leaves_out": True,
    }
    assert done.stdout.splitlines() == [f"{name} {is_loaded}" for name, is_loaded in loaded.items()], done.stderr


NO_COMPILER = {"TRIMTAB_NATIVE": "0"}


@pytest.mark.parametrize(
    ("load", "set_already", "spin"),
    [
        (3.9, NO_COMPILER, "5000"),
        (4.0, NO_COMPILER, "0"),
        (9.0, {"TRIMTAB_NATIVE": "1", "CXX": "g++"}, "5000"),  # ops/cpp/crowd.cpp looks at the load all the time
        (9.0, NO_COMPILER | {"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_threads_that_wait_do_not_spin_where_the_cores_are_taken_and_nobody_looks(
    load: float, set_already: dict[str, str], spin: str
) -> None:
    """Two cores: as many threads again may wait for them."""
    code = (
        f"import os; os.getloadavg, os.cpu_count = lambda: ({load}, 0, 0), lambda: 2; import trimtab; print(os.environ['GOMP_SPINCOUNT'])"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | {"PYTHONPATH": str(SOURCE)} | set_already, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{spin}\n", done.stderr


def test_a_system_that_does_not_tell_its_load_is_taken_for_a_quiet_one() -> None:
    code = "import os; del os.getloadavg; import trimtab; print(os.environ['GOMP_SPINCOUNT'])"
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=kept | {"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, timeout=60)
    assert done.stdout == "5000\n", done.stderr
