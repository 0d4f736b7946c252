"""Start processes: one node's through torchrun, a notebook's by forking it, and the questions of `launch.sh config`.

Read `job` first (the processes of one node, and whose failure is shown), then `notebook` and `config`. `launch.sh`
decides how many processes to start; it runs this package as `python -m nanofinetune.launch`.
"""
