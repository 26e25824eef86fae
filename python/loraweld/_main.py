"""The command line, in this process."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Runs the program's arguments, and gives its exit code."""
    from ._loraweld import main as run

    # Mesa's drivers look for a desktop in this folder, and complain on stderr if it is no absolute path.
    if sys.platform == "linux" and not os.path.isabs(os.environ.get("XDG_RUNTIME_DIR", "")):
        os.environ["XDG_RUNTIME_DIR"] = "/dev/null"
    sys.stdout.flush()
    return run(["loraweld", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
