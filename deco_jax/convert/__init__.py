"""PyTorch checkpoints to our parameters and back, by tables that are strict both ways."""
