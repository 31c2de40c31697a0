"""The GPU's backend: a program as Triton code that one launch runs over units of all tensors.

Nothing here knows the CPU's backend or an optimizer.
"""
