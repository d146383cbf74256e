"""What a merge costs: a step of the optimisation, and the methods that need no data."""
