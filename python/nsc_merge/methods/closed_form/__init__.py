"""Methods that solve for the update from statistics of calibration data."""
