"""What Python runs first in each process that a test starts (tests/conftest.py puts this folder on its path)."""

import gc

# Importing torch and transformers makes half a million objects, among which there is no garbage to look for: an eighth
# of the time that a process takes to begin.
gc.set_threshold(50_000, 20, 20)
