"""One file per recipe; its docstring says what it trains, on what, and with which scores."""
