"""Kernels; no other package has any. In the order of a forward: `layer`, `edit`, `attend`, `loss`."""

from typing import TYPE_CHECKING

from trimtab.lazy import load_on_first_use

if TYPE_CHECKING:
    from trimtab.ops.attend import QUERY_BLOCK, attention
    from trimtab.ops.dropout import dropout, row_keys
    from trimtab.ops.edit import (
        ACTIVATIONS,
        Bottleneck,
        add_noise,
        by_span,
        dora,
        gathers,
        lora,
        lora_embedding,
        lora_grouped,
        replace,
        scale_input,
        scale_output,
    )
    from trimtab.ops.experts import Routes, experts_product, lora_experts
    from trimtab.ops.grouped import Factors, copy_lists, grouped_rows, stack_factors, trains_grouped
    from trimtab.ops.layer import Matrix, largest, linear_into, linears, rms_norm, rotate, swiglu
    from trimtab.ops.loss import log_probabilities, loss_rows, supervised_loss
    from trimtab.ops.moving import floats, index, to_host, upload
    from trimtab.ops.native_attention import FlatIndex, QueryIndex, attend_rows, flat_attention, flat_index, query_index, takes_flat
    from trimtab.ops.paged import PagedIndex, page_size, paged_attention, paged_index, paged_kernel
    from trimtab.ops.varlen import VarlenIndex, varlen_attention, varlen_index, varlen_kernel
else:
    load_on_first_use(__name__)

__all__ = [
    "ACTIVATIONS",
    "Bottleneck",
    "Factors",
    "FlatIndex",
    "Matrix",
    "QUERY_BLOCK",
    "PagedIndex",
    "QueryIndex",
    "Routes",
    "VarlenIndex",
    "add_noise",
    "attend_rows",
    "attention",
    "by_span",
    "copy_lists",
    "dora",
    "dropout",
    "experts_product",
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
    "loss_rows",
    "lora",
    "lora_embedding",
    "lora_experts",
    "lora_grouped",
    "page_size",
    "paged_attention",
    "paged_index",
    "paged_kernel",
    "query_index",
    "replace",
    "rms_norm",
    "rotate",
    "row_keys",
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
