"""What a run costs before it runs: parameters, bytes, memory, time."""
