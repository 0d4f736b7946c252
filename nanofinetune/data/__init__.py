"""From a name to tokens: the task table, the columns of a file, and token ids kept as flat arrays.

Read `tasks`, `load`, `columns`, `tokens`, `cache` in this order; `pretrained` finds the model and its tokenizer, and
`stdlib_pairs` makes a data set where there is no network.
"""
