"""Converts PyTorch checkpoints to our parameters and back, by tables that are strict in both directions."""
