"""The trady command: the training loop behind it, data, checkpoints, plots and reports."""
