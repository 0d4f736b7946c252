"""Watch a real job from the inside: `python -m nanofinetune.trace` trains two updates on two ranks and tells what ran.

Read `observe` (what each rank, each process of the job, notes), `told` (the report), `timeline` (all of it as a file
for a viewer) and `picture` (the last update as a drawing).
"""
