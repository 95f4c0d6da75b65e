"""Find a base model, load it frozen, and name it by what it holds (floor 1).

Knows nothing about adapters: it hands out a `transformers` causal LM, its tokenizer, its folder and its fingerprint.
"""

from typing import TYPE_CHECKING

from trimtab.lazy import load_on_first_use

if TYPE_CHECKING:
    from trimtab.bases.bundled import BUNDLED_NAMES
    from trimtab.bases.cache import cache_dir
    from trimtab.bases.doctor import Check, examine, guarded
    from trimtab.bases.fingerprint import fingerprint_folder, fingerprint_model, template_digest, tokenizer_digest
    from trimtab.bases.folder import check_folder, folder_problems
    from trimtab.bases.load import LoadedBase, default_dtype, load, resolve_device, resolve_dtype
    from trimtab.bases.locate import locate
else:
    load_on_first_use(__name__)

__all__ = [
    "BUNDLED_NAMES",
    "Check",
    "LoadedBase",
    "cache_dir",
    "check_folder",
    "default_dtype",
    "examine",
    "fingerprint_folder",
    "fingerprint_model",
    "folder_problems",
    "guarded",
    "load",
    "locate",
    "resolve_device",
    "resolve_dtype",
    "template_digest",
    "tokenizer_digest",
]
