"""What tensors are at this moment: where they lie, whether they changed, and what passes leave to
one another there.

Nothing here knows a rule's mathematics or an optimizer.
"""
