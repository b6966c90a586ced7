"""One HTML file of a run, or of several side by side, that opens without a network."""
