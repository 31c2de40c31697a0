"""What both compiled backends need of LLVM: text as machine code (`native`), and a rule's
arithmetic as text (`code`).

The host computes what is the same for all elements of a launch (`uniforms`), for the CPU and for a
GPU. Nothing here knows a tensor or an optimizer.
"""
