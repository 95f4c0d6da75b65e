"""Training: many variants on one frozen base, each as if it were alone. The package itself can be called: `trimtab.train("run.yaml")` is
`trimtab.python.training.train`."""

from typing import TYPE_CHECKING

from trimtab.lazy import load_on_first_use

if TYPE_CHECKING:
    from trimtab.train.config import RunConfig
    from trimtab.train.listen import Listener
    from trimtab.train.loop import Report, train
else:
    load_on_first_use(__name__)

__all__ = ["Listener", "Report", "RunConfig", "train"]
