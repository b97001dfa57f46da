"""Checks of the kernels' compiled code that need no GPU. The simulator of AMD machine code is in `cdna`."""
