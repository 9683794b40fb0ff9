"""The operations as Triton kernels: one file per kernel, named like its operation."""
