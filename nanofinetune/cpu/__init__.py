"""The same results up to rounding, faster on a CPU. Only train.py (and bench/) uses it; training works without it.

Read `lean` (positions that nobody reads are not computed; `mpnet` does so where attention is of another kind),
`dropout` (torch's masks, drawn faster) and `memory` (freed memory is kept for the next step).
"""
