"""`python -m slora`."""

import sys

from slora.cli import main

sys.exit(main())
