"""From a name to tokens: which data set, which columns, and token ids kept as flat arrays.

Read `tasks`, `unpack`, `files`, `load`, `columns`, `multilabel`, `leaks`, `tokens`, `cache`, then `rows` (for predict).
`pretrained` loads the model and its tokenizer: `limits` (how large one may be), `outline` (how many positions it has),
`padding` (the same in both), `head` (its classes are the data's). `balance` weighs classes, `stdlib_pairs` builds a
data set where there is no network, and `job` puts it all together for train.py.
"""
