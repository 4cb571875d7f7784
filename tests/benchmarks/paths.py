"""Imported first by each benchmark: puts the repository before this folder on the path, where benchmarks that are
named like packages of the project would shadow them."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry).resolve() not in (HERE, ROOT)), str(HERE)]
