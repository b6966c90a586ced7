"""What papers vary, as values with small protocols: path, prediction, times, losses, averages; and the optimizer."""
