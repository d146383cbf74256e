"""What a run would take, by formula, before anything is loaded."""
