"""Calibration batches: read from files, drawn for every task, and put together into forward passes."""
