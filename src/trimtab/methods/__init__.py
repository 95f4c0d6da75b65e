"""Every PEFT method, one file each. Importing this package fills the registry `METHODS` (peft_type -> class)."""

from trimtab.methods.base import METHODS, Method
from trimtab.methods.bottleneck import BottleneckConfig
from trimtab.methods.full import FullConfig
from trimtab.methods.ia3 import IA3Config
from trimtab.methods.lora import LoraConfig
from trimtab.methods.prefix import PrefixTuningConfig
from trimtab.methods.prompt import PromptTuningConfig

_ALL: list[type[Method]] = [*METHODS.values(), FullConfig]
BY_NAME = {cls.name: cls for cls in _ALL}
"""name in run files -> class; `full` is here and not in METHODS, since it is no part of a mixed batch."""

__all__ = [
    "BY_NAME",
    "METHODS",
    "BottleneckConfig",
    "FullConfig",
    "IA3Config",
    "LoraConfig",
    "Method",
    "PrefixTuningConfig",
    "PromptTuningConfig",
]
