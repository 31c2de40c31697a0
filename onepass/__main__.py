"""`python -m onepass` does the same as the program `onepass`."""

import sys

from .app.cli import main

if __name__ == "__main__":
    sys.exit(main())
