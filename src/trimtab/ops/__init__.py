"""Kernels; no other package has any. In the order of a forward: `layer`, `edit`, `attend`, `loss`."""

from typing import TYPE_CHECKING

from trimtab.lazy import load_on_first_use

if TYPE_CHECKING:
    from trimtab.ops.attend import QUERY_BLOCK, attention
    from trimtab.ops.edit import (
        ACTIVATIONS,
        Bottleneck,
        by_span,
        dora,
        dropout,
        gathers,
        lora,
        lora_embedding,
        lora_grouped,
        replace,
        scale_input,
        scale_output,
    )
    from trimtab.ops.grouped import Factors, grouped_rows, stack_factors, trains_grouped
    from trimtab.ops.layer import Matrix, largest, linear_into, linears, rms_norm, rotate, swiglu
    from trimtab.ops.loss import LOSS_ROWS, log_probabilities, supervised_loss
    from trimtab.ops.moving import floats, index, to_host, upload
    from trimtab.ops.native_attention import FlatIndex, QueryIndex, attend_rows, flat_attention, flat_index, query_index, takes_flat
    from trimtab.ops.varlen import VarlenIndex, varlen_attention, varlen_index, varlen_kernel
else:
    load_on_first_use(__name__)

__all__ = [
    "ACTIVATIONS",
    "Bottleneck",
    "Factors",
    "FlatIndex",
    "LOSS_ROWS",
    "Matrix",
    "QUERY_BLOCK",
    "QueryIndex",
    "VarlenIndex",
    "attend_rows",
    "attention",
    "by_span",
    "dora",
    "dropout",
    "flat_attention",
    "flat_index",
    "floats",
    "gathers",
    "grouped_rows",
    "index",
    "largest",
    "linear_into",
    "linears",
    "log_probabilities",
    "lora",
    "lora_embedding",
    "query_index",
    "lora_grouped",
    "replace",
    "rms_norm",
    "rotate",
    "scale_input",
    "scale_output",
    "stack_factors",
    "supervised_loss",
    "swiglu",
    "takes_flat",
    "to_host",
    "trains_grouped",
    "upload",
    "varlen_attention",
    "varlen_index",
    "varlen_kernel",
]
