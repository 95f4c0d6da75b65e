"""trimtab: train small adapters on a frozen language model, keep them as checked folders, serve many of them together.

Every name is loaded on first use, so `import trimtab` takes almost no time.
"""

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from trimtab.compiler import find_compiler
from trimtab.lazy import load_on_first_use
from trimtab.version import __version__

# libgomp's threads spin while they wait for each other, for longer than most of our operations take. Where other work shares the cores,
# that slows every step up to 25 times: two threads that share a core for a while each spin away the time that the other needs. A shorter
# spin keeps 95% of the speed of a quiet machine, and ops/cpp/crowd.cpp ends it as long as the cores are taken. Where no compiler builds
# that, and twice as many threads as cores want to run now, a thread that waits sleeps at once. Only the first import of torch reads this,
# and a user's own choice stays.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "5000"
    with suppress(AttributeError, OSError):  # a system that does not tell its load
        if os.getloadavg()[0] >= 2 * (os.cpu_count() or 1) and find_compiler()[0] is None:
            os.environ["GOMP_SPINCOUNT"] = "0"

# torch keeps what it compiles for each shape of a product, 1,024 of them in two caches. Each step has another number of rows, so what is
# kept is not met again: 0.5 GB after 50 steps of SmolLM2-135M, for nothing. The shapes of one step fit into 64.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")

if TYPE_CHECKING:
    from trimtab.errors import TrimtabError
    from trimtab.methods import BottleneckConfig, FullConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
    from trimtab.model import Base, load_base
    from trimtab.python.adapters import export, merge
    from trimtab.python.scoring import compare, evaluate
    from trimtab.python.serving import serve
    from trimtab.python.training import check, sweep, train
    from trimtab.store import Adapter
    from trimtab.store.registry import Store
    from trimtab.train import RunConfig
    from trimtab.train.callbacks import Callback
    from trimtab.train.interrupt import Interrupted
    from trimtab.train.loop import Report
else:
    load_on_first_use(__name__)

__all__ = [
    "Adapter",
    "Base",
    "BottleneckConfig",
    "Callback",
    "FullConfig",
    "IA3Config",
    "Interrupted",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "Report",
    "RunConfig",
    "Store",
    "TrimtabError",
    "__version__",
    "check",
    "compare",
    "evaluate",
    "export",
    "load_base",
    "merge",
    "serve",
    "sweep",
    "train",
]
