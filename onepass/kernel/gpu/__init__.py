"""The GPU's backend: a program as Triton code that one launch runs over units of all tensors.

    expressions            the mathematics of a pass, as text
    walk, blocks, tiles    the walk around it: over elements, or over matrices
    uniforms               what is computed on the device for each tensor, as text
    source, jit            the text of a whole module, and the module
    units, partials        how tensors are cut into work, and where its shares of sums are
    host, foretold         uniforms that the host computes, and sends ahead
    uploads, devices       tables on a device, and whether a device has kernels
    launch                 the kernel, and its launches

It knows a program and addresses. Nothing here knows the CPU's backend, an optimizer, or where
tensors come from.
"""
