"""A long run: it can be stopped and resumed, and what goes wrong on one rank is known on all.

Read `run` first: the object around train.py's loop. Then `log` (losses, and the place in the data), `checkpoint` (files
that survive a kill), `state` (all ranks' objects in one checkpoint), `resume` (where a run begins), `signals`, and
`watch` (which names a rank that hangs).
"""
