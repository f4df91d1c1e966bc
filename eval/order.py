"""`python eval/order.py` is `dinov2-eq eval order`, also from a checkout that is not installed."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
runpy.run_module("dinov2_eq.eval.order", run_name="__main__")
