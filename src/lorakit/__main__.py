"""`python -m lorakit`, and what launchers of several processes start: `torchrun -m lorakit`."""

import sys

from lorakit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
