"""The same numbers, faster on a CPU. Nothing but train.py knows of this room: leave it out, and only speed changes.

Read `lean` (padding and unread positions are not computed), `dropout` (torch's masks, drawn faster), `embedding` (a
gradient without a table of zeros) and `memory` (freed pages are kept).
"""
