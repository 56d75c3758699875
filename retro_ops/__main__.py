"""`python -m retro_ops`."""

import sys

from retro_ops.cli import main

sys.exit(main())
