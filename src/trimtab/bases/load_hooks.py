"""Where transformers, which builds a model and reads its files, calls back: it takes `Load` for a way of quantising."""

from __future__ import annotations

from typing import Any, Protocol

from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

_METHOD = "trimtab"


class Load(Protocol):
    """What is done while a model is read."""

    def prepare(self, model: Any) -> None:
        """Before: the model's parameters have no numbers yet."""

    def packs(self, parameter: str) -> bool:
        """Whether `get_ops` is to be called for a parameter that has been read."""

    def get_ops(self) -> ConversionOps: ...

    def fill(self, model: Any) -> None:
        """After: transformers has read what it reads."""


@register_quantization_config(_METHOD)
class _Config(QuantizationConfigMixin):
    """What transformers calls back during a load."""

    def __init__(self, load: Load):
        self.quant_method, self.load = _METHOD, load


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config.load.prepare(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config.load.fill(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self.quantization_config.load.packs(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        ops: ConversionOps = self.quantization_config.load.get_ops()
        return ops

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def forget_quantization(model: Any) -> None:
    """Make a model an ordinary one in transformers' eyes: whoever multiplies by its matrices asks the modules."""
    for holder, names in (
        (model.config, ("quantization_config", "_is_quantized")),
        (model, ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions")),
    ):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)


def load_options(load: Load) -> dict[str, Any]:
    """The options of `from_pretrained` that make it call `load` back."""
    return {"quantization_config": _Config(load)}
