"""How a step is made: which parameters go together, what is checked before, and what is undone
after a failure.

A step reads everything, then begins what may fail, then stores: an error changes nothing. Nothing
here knows an algorithm's mathematics, or how a backend works.
"""
