"""Methods that merge in low-rank spaces, by singular value, CUR or other decompositions of the factors."""
