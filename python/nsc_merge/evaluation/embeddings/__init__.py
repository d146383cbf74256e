"""Tasks of an evaluation that compare embeddings of texts."""
