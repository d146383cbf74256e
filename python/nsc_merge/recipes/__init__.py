"""What nsc-merge run does: a recipe read, checked, and run; a saved merge read back."""
