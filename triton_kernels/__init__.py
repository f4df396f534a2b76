"""Triton kernels of fusedopt, imported as fusedopt.triton_kernels, and only where they are used.

- rules.py: the maths of one element of each optimizer.
- table.py: reads the tensor table (csrc/core/table.h).
- norm.py: the squared norm of the gradients, and the barrier between the passes.
- apply.py: the kernel of a step.
- launch.py: starts it.
- tune.py: chooses block size and warps by measuring.

docs/triton.md explains them.
"""
