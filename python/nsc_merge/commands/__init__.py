"""Groups of commands of ``nsc-merge``; importing them loads no library."""
