"""What a run will cost: parameters, bytes, memory, time."""
