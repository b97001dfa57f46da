"""One op per file, read from the mathematics down to the launch: reference in PyTorch, kernel, launcher.

The references are the CPU implementation and the oracle of the kernels.
"""
