"""What calibration windows show: inputs of layers, their order, errors, ratios."""
