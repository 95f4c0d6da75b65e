"""Weight formats, one file each. Importing this package fills the registry: every file in this folder is imported, so that a format is
there as soon as its file is."""

from importlib import import_module
from pkgutil import iter_modules

from trimtab.bases.weights.base import FORMATS, Weight, claimed, first_weight, norm_weight, stored_parts, stored_state, weight_of

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["FORMATS", "Weight", "claimed", "first_weight", "norm_weight", "stored_parts", "stored_state", "weight_of"]
