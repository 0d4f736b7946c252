"""Start processes: one node's through torchrun, a notebook's by forking it, and the questions of `launch.sh config`.

Read `job` first (the processes of one node, and whose failure is shown), then `rendezvous` (where they meet),
`notebook` and `config`. launch.sh decides how many processes to start, and runs `python -m nanofinetune.launch`.
"""
