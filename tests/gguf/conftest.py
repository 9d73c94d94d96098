"""Tokenizers of other tests, and folders to be converted."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "vocabulary"))
