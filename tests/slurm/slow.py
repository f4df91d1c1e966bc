"""A transform that takes its time, so that a test can do something to a run while it goes on."""

import time
from pathlib import Path

from dinov2_eq.equivariance.transforms import SE2

SIGN = Path("slowly")  # in the working directory of the run


class Slow(SE2):
    """As `se2`, and half a second longer while there is a file called `SIGN`, in each of two calls a step."""

    def apply(self, images, theta, size):
        if SIGN.exists():
            time.sleep(0.5)
        return super().apply(images, theta, size)
