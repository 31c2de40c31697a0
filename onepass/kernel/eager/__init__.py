"""Graphs by torch's own operations: on any device, for any class of tensor, also under autograd.

`single` computes one tensor at a time, node by node. `foreach` computes many tensors at once, if a
graph is elementwise. Both take a finished graph and write nothing. Nothing here knows a program, a
kernel or an optimizer.
"""
