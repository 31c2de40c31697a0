"""What tensors are at this moment: where they lie, whether they changed, what passes leave there.

How a tensor lies (`memory`), whether tensors are as a plan expects them (`facts`, and the text of
its compiled part in `comparison`), numbers by their addresses (`numbers`), and what one pass leaves
to a later one (`temporaries`). Nothing here knows a rule's mathematics or an optimizer.
"""
