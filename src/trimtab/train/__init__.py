"""Training: many variants on one frozen base, each as if it were alone. The package itself can be called: `trimtab.train("run.yaml")`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from trimtab.lazy import LazyPackage, load_on_first_use

if TYPE_CHECKING:
    from trimtab.train.config import RunConfig
    from trimtab.train.listen import Listener
    from trimtab.train.loop import Report, train
else:
    load_on_first_use(__name__)

__all__ = ["Listener", "Report", "RunConfig", "train"]


class _Callable(LazyPackage):
    """`trimtab.train` names this package and the function that users call; importing a submodule must not hide the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        from trimtab.train.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
