"""`python -m rectiflow COMMAND`."""

import os
import sys

# `-m` puts the current folder on the path; when that is this one, its folders would answer to names such as `nodes`.
_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != _HERE]

from .cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
