"""Training: many variants on one frozen base, each as if it were alone. The package itself can be called: `trimtab.train("run.yaml")`."""

import sys
from types import ModuleType
from typing import Any

from trimtab.train.config import RunConfig
from trimtab.train.listen import Listener
from trimtab.train.loop import Report, train

__all__ = ["Listener", "Report", "RunConfig", "train"]


class _Callable(ModuleType):
    """`trimtab.train` names this package and the function that users call; importing a submodule must not hide the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
