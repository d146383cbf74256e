"""Samples made inputs of a model: text, images, audio."""
