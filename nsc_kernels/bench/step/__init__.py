"""One step of a merge of a model with random weights: needs transformers, and nsc_merge above this package."""
