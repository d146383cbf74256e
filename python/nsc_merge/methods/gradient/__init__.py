"""Methods that learn coefficients by gradient descent."""
