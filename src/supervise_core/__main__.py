"""``python -m supervise_core``."""

import sys

from supervise_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
