"""What both compiled backends need of LLVM: text as machine code, and arithmetic as text.

`native` makes functions of text, `code` makes text of a program's values. The host computes what is
the same for all elements of a launch (`uniforms`), for the CPU and for a GPU. Nothing here knows a
tensor or an optimizer.
"""
