"""The CPU's backend: a program as LLVM code that threads run over chunks of all tensors.

    elements, lines   the mathematics of a pass, as text: over elements, or line by line
    walk              how threads take work and call it, as text
    team              how threads wait for one another
    chunks            how tensors are cut into work
    launch            the kernel, and its launches

It knows a program and addresses. Nothing here knows the GPU's backend, an optimizer, or where
tensors come from.
"""
