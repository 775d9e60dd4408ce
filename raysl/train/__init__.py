"""The training loop, checkpoints, health checks and device operations; torch only."""
