"""What a merge gives: the merged update, and everything that is written of it."""
