"""A step that differs from the last one only in values, read and taken by machine code.

`sheet` has the tables of such a step: what its options, parameters, gradients and states must be,
and where what is read goes. `program` has the machine code that walks a sheet. It knows Python's
objects and torch's words (`tensors.words`), and nothing of algorithms or batches.
"""
