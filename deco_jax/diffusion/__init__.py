"""The flow from noise to data: path, guidance and samplers, as pure functions."""
