"""What a paper varies: path, times, losses, optimizer, as pure functions."""
