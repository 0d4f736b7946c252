"""A page of a run: `python -m nanofinetune.report runs/a` writes one file that a browser opens without a network.

Read `read` (what a run has left, each file a stranger's), `thin` (a million updates in a few hundred buckets) and
`judge` (how often the model is right, and how sure it is). Then `plots`, `svg` (a drawing made fit for the page),
`style`, `pieces`, `tables` and `page` (the html), and `write` (onto the disk, over nothing that is not ours).
"""
