"""What keeps a run alive: mesh, state, checkpoints, several hosts, signals, logs."""
