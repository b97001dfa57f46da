"""Functional simulator of AMD CDNA2, 3 and 4 machine code (gfx90a, gfx942, gfx950) on numpy.

Owns: parsing the assembly text that a compiler emits, executing it, and the checkers of memory, waits and races. Does
not own: compiling kernels, and anything about time: no cycles, caches or hazards. It was written after AMD's public
instruction set manuals and has never been compared with silicon. `run.run_kernel` is the way in.
"""
