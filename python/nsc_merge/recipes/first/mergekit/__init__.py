"""What nsc-merge import does: a configuration of mergekit made a recipe."""
