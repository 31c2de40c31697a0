"""The backend of torch's own operations: any device, any tensor class, and autograd.

`single` computes one tensor, `foreach` many in a row. Nothing here knows a compiled backend or an
optimizer.
"""
