"""How processes come into being: `launch.sh config`, torchrun with the first failure last, ranks from a notebook.

Read `job` (one node's processes), `notebook` (forked ranks) and `config` (the questions). Run by launch.sh, or as
`python -m nanofinetune.launch`.
"""
