"""One device: what a training step is made of. Each file stands alone: copied by itself, it needs torch and numpy only.

Read them in the order of a step: `order` (which rows come next), `collate` (rows to a padded batch), `optim` (gradients
to new weights), `schedule` (the next learning rate), `metrics` (predictions to scores).
"""
