"""Many ranks: which rows each of them gets, what they tell each other, and how gradients are averaged.

A *rank* is one of the processes that train together. Read `shard` (whole numbers only) and `naive_ddp` (thirty lines)
first; each stands alone, and so does `ddp`. Then `world` (the process group), `collectives` (gather, reduce, broadcast)
and `loader` (a DataLoader that knows which batch is the last).
"""
