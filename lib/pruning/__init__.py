"""Calibration and pruning of one decoder block at a time."""
