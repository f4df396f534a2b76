"""The benchmarks of fusedopt and its peers: `python -m bench --help`."""

import os

# torch's profiler reports on stderr whenever it starts or stops, as a message of its fifth level;
# 99 is above all levels. It asks when it is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
