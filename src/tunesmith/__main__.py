"""`python -m tunesmith`: the command line."""

import sys

from tunesmith.cli import main

if __name__ == "__main__":  # a worker process imports this file too, under another name
    sys.exit(main())
