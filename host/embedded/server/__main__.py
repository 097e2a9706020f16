"""`python -m rectiflow.host.embedded.server`: what `rectiflow serve` runs."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
