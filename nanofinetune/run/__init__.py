"""A long run: what the course's loop leaves to luck.

Read `run` first: the object around train.py's loop. Then `log` (losses, and the place in the data), `checkpoint` (files
that survive a kill), `state` (all ranks' objects into one checkpoint), `resume` (where a run begins), `signals` and
`watch` (a rank that hangs is named).
"""
