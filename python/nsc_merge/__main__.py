"""``python -m nsc_merge``: the ``nsc-merge`` command."""

import sys

from nsc_merge.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
