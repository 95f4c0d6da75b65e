"""What a configuration may name of the kernels; without torch, since run files are checked without it."""

NON_LINEARITIES = ("relu", "gelu", "silu", "tanh", "leakyrelu", "sigmoid", "linear")
"""Of bottleneck adapters, in the order of the native kernels' numbers."""
