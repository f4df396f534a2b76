"""Triton kernels of fusedopt, imported as fusedopt.triton_kernels. None yet."""
