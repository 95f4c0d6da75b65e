"""The items of bench/gpu.py: what is measured on a GPU, a file for each kind of work."""
