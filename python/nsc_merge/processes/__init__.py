"""Several processes that share one merge: who they are, and how a launcher starts them."""
