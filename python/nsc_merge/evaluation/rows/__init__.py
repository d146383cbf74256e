"""Rows of an evaluation as they are kept, so that none is measured twice, and what makes them honest ones."""
