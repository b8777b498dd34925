"""Triton's kernels without a GPU: in its interpreter, which a process chooses before it imports them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def interpreted(expression: str, *, imports: str) -> Any:
    """The JSON value of an expression in a process that interprets kernels; ``imports`` as "from x import y"."""
    program = f"import json, torch\n{imports}\nprint(json.dumps({expression}))"
    told = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)
