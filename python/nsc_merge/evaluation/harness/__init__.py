"""Tasks of the lm-evaluation-harness (EleutherAI), measured on models that are in memory."""
