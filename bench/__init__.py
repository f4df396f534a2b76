"""The benchmarks of fusedopt and its peers: `python -m bench --help`."""
