"""Merges of every type of model that a library has, small and random, held against PEFT."""
