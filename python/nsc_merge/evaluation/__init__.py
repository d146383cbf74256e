"""Measures merged models: metrics, the papers' normalisation, evaluation recipes, tables and plots."""
