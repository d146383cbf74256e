"""A base model: what its files say, how it is loaded and held, and where the numbers of its weights are."""
