"""The problem of an experiment, the training loop, and its optimizers."""
