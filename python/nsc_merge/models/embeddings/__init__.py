"""Embeddings of texts, as sentence-transformers makes them of a model's features."""
