"""The chapters behind the root modules: what the three commands at the root stand on, and one
command, `alpaca VERB`, for everything else.

common, weights, inference, training, datagen, evaluation, capability, serving: each folder's
`__init__.py` says what it teaches and in which order to read it. Imports go one way: root modules
are read by the chapters, the chapters by the commands at the root.
"""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]

if not (CHECKOUT / "model.py").is_file():
    sys.exit("alpaca: model.py is not beside it: install with `pip install -e .` from a checkout")
# First, so that a model.py or dataset.py of the user's own in the current folder is not ours.
sys.path.insert(0, str(CHECKOUT))
