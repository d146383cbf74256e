"""The suites: a base model, an adapter per task and the tasks' data, each trained where it is missing."""
