"""What stands around an adapted module while its coefficients are found: a merged one, on the base's own numbers."""
