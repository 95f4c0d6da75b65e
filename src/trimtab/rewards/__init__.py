"""Rewards of sampled answers: what a run file names, the built-in ones, and the processes that they run in.

`spec` reads what a run file says, `builtin` has the functions that need no code of the user's, `worker` runs one reward in a process of its
own, `asked` talks to these processes and bounds their time. None of these files loads torch.
"""
