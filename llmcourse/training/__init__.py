"""Training: the one loop, optimizers, schedules, checkpoints, and the stages built on them."""
