"""`python -m onepass`: the same as the `onepass` program."""

import sys

from .app.cli import main

if __name__ == "__main__":
    sys.exit(main())
