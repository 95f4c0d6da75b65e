"""trimtab: train small parts that steer a large frozen language model, keep them as verifiable artifacts, serve many of them together.

Everything named here is loaded on first use, so that `import trimtab` costs nothing.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# libgomp's threads spin while they wait for each other, for longer than most of our operations take. Where other work shares the cores that
# slows every step up to 25 times; a shorter spin keeps 95% of the speed of a quiet machine and a quarter of it on a crowded one. Only the
# first import of torch reads this, and a user's own choice stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

if TYPE_CHECKING:
    from trimtab.errors import TrimtabError
    from trimtab.methods import BottleneckConfig, FullConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
    from trimtab.model import Base, load_base
    from trimtab.store import Adapter
    from trimtab.train import RunConfig, train

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "store",
    "Base": "model",
    "BottleneckConfig": "methods",
    "FullConfig": "methods",
    "IA3Config": "methods",
    "LoraConfig": "methods",
    "PrefixTuningConfig": "methods",
    "PromptTuningConfig": "methods",
    "RunConfig": "train",
    "TrimtabError": "errors",
    "load_base": "model",
    "train": "train",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(import_module(f"trimtab.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
