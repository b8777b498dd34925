"""``python -m lemon STAGE ...``: the command ``lemon`` of this very Python."""

import sys

from lemon.cli import main

sys.exit(main())
