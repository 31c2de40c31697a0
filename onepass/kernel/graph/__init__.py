"""The language of rules: from a function to a program of passes, with the standard library only.

Nodes (`ir`), how numbers are stored (`formats`), what a rule says of itself (`signature`), a rule's
graph (`trace`), its walks over memory (`passes`, made by `cut`), and how long all of it is kept
(`caches`). Nothing here knows a tensor, a device or a backend.
"""
