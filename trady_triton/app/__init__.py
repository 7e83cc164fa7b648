"""The `trady` command: training loop, data, checkpoints, tables and plots. May import timm; the library may not."""
