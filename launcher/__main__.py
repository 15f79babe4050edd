"""`python -m launcher`: the same as `dsft`."""

import sys

from launcher.cli import main

sys.exit(main())
