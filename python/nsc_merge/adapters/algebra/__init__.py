"""The algebra of low-rank factors."""
