"""Every PEFT method, one file each. Importing this package fills the registries: every file in this folder is imported, so that a method is
there as soon as its file is."""

from importlib import import_module
from pkgutil import iter_modules

from trimtab.methods.base import BY_NAME, METHODS, Method
from trimtab.methods.bottleneck import BottleneckConfig
from trimtab.methods.full import FullConfig
from trimtab.methods.head import Head
from trimtab.methods.ia3 import IA3Config
from trimtab.methods.lora import LoraConfig
from trimtab.methods.prefix import PrefixTuningConfig
from trimtab.methods.prompt import PromptTuningConfig

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
BY_NAME[FullConfig.name] = BY_NAME.pop(FullConfig.name)  # it is the last one in every table

__all__ = [
    "BY_NAME",
    "METHODS",
    "BottleneckConfig",
    "FullConfig",
    "Head",
    "IA3Config",
    "LoraConfig",
    "Method",
    "PrefixTuningConfig",
    "PromptTuningConfig",
]
