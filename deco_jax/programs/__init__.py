"""One program a mode."""
