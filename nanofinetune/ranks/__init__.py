"""Many ranks: which rows each of them gets, what they say to each other, and how gradients are averaged.

Read `shard` (whole numbers only) and `naive_ddp` (twenty lines) first; both stand alone, and so does `ddp`. Then
`environment` (which rank is this process?), `world` (the process group), `collectives` (gather, reduce, broadcast) and
`loader` (a DataLoader that knows which batch is the last).
"""
