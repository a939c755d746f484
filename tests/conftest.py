"""One thread for each test process: they run side by side, and threads that wait for a core are slower than one."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
