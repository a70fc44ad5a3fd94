"""What an experiment is handed: its run directory, metrics, checkpoints, batch order and stop flag."""
