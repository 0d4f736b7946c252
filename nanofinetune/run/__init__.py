"""A long run: it can be stopped and resumed, and what goes wrong on one rank is known on all.

Read `run` first: the object around train.py's loop. Then `log` (losses, and the place in the data), `folders` (they
appear complete or not at all), `checkpoint` (what is in one), `schema` (what fits an object), `state` (all ranks'
objects in one), `resume` (where a run begins), `same` (all ranks begin alike), `plan` (what it will do), `trial` (what
cannot work fails first), `evaluation`, its `scores` and `answers` (what the model says), `best` (which epoch is kept),
`result` (what it leaves), `signals`, and `watch` (it names a rank that hangs).
"""
