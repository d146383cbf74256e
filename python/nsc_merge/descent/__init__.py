"""Learning coefficients: the objective of NSC, the optimisation, and its state."""
