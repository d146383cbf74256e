"""What shows the kernels correct on a machine, and sets the tables that they choose by."""
