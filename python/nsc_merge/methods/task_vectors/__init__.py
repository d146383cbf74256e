"""Methods that merge the entries of dense updates."""
