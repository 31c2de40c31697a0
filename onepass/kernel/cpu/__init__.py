"""The CPU's backend: a program as LLVM code that threads run over chunks of all tensors.

Nothing here knows the GPU's backend or an optimizer.
"""
