"""Other merge codebases, and ours in their place: agreement, seconds, memory."""
