"""What nsc-merge init does: adapters, base and data looked at, and a first recipe for them written."""
