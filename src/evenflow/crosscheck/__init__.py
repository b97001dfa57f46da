"""Checks of the GPU kernels that need no GPU: the compilers for AMD and NVIDIA run anywhere, and tell what they made.

`targets` says which GPUs, `compiling` makes the code, `artefacts` reads it, `gate` judges it, `budgets` remembers how
long it was; `cdna` executes AMD's machine code, and `running` compares what it computes with the references. Importing
this package imports neither torch nor triton.
"""
