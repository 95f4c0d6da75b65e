"""Every objective, one file each. Importing this package fills the registry: every file in this folder is imported, so that an objective is
there as soon as its file is."""

from importlib import import_module
from pkgutil import iter_modules

from trimtab.objectives.base import OBJECTIVES, Counts, Objective, Segments, aimed_at, directions
from trimtab.objectives.sft import Sft

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["OBJECTIVES", "Counts", "Objective", "Segments", "Sft", "aimed_at", "directions"]
