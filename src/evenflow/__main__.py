"""python -m evenflow: the command line."""

import sys

from evenflow.cli import main

sys.exit(main())
