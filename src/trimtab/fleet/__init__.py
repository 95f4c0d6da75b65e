"""Several servers of one base under traffic: what they would do, simulated with the scheduler that they have."""
