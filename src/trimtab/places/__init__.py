"""Where a run computes: in one process (`place.py`), or in the ranks of torch.distributed (`ranks.py`). `launch.py` starts them."""
