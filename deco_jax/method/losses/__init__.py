"""The terms of the objective, as pure functions that return one value an example."""
