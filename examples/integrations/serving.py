"""Which servers take an adapter as it is, and the same update as the others take it.

    python examples/integrations/serving.py merged/lora served
"""

from __future__ import annotations

import sys
from pathlib import Path

from nsc_merge.integrations.serving import SERVERS, check, write_uniform

if len(sys.argv) != 3:
    sys.exit(f"usage: {sys.argv[0]} ADAPTER OUT")
adapter, out = Path(sys.argv[1]), Path(sys.argv[2])
for server in SERVERS:
    found = check(adapter, server)
    print(found)
    if found.problems:
        # One rank for all linears, filled up with zeros; refused where that is not the cure.
        try:
            print(write_uniform(adapter, out / server, server))
        except ValueError as error:
            print(f"{server}: {error}")
