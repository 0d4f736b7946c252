"""The same numbers, faster on a CPU. Only train.py knows this room: without it training is slower, and nothing else.

Read `lean` (positions that nobody reads are not computed), `dropout` (torch's masks, drawn faster), `embedding` (a
gradient that costs what the batch's rows cost) and `memory` (freed memory is kept for the next step).
"""
