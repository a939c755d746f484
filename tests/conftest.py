"""Settings of the whole suite: test processes run side by side, on machines of any speed."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for a core are slower than one; set before torch is imported

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
