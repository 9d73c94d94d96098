"""Tests run from the repository root, offline, on two threads and without progress bars."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of transformers or datasets
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

torch.set_num_threads(2)
logging.disable_progress_bar()
