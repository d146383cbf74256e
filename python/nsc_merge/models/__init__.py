"""Model families, and what is done to a model: adapters fitted and attached, weights folded, forwards watched."""
