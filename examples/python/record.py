#!/usr/bin/env python3
"""`python -m loraweld.recorder` of this repository, for who has not installed the package; `--help` tells the rest."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[2] / "python/loraweld/recorder.py"), run_name="__main__")
