"""One device: what a training step is made of. Each file stands alone: copy it, and it needs torch and numpy only.

Read them in the order of a step: `order` (which rows), `collate` (rows to a padded batch), `optim` (gradients to new
weights), `schedule` (the next learning rate), `metrics` (predictions to scores).
"""
