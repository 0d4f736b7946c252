"""Drop-in: the rest of Accelerate's names, so that a script changes its import lines and nothing else.

Each is a function of a few lines whose first argument is the Accelerator. Read `processes` (who runs what) and `saving`
(weights without a checkpoint); nothing else needs them.
"""
