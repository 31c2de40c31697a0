"""The learning-rate range test: `search` runs it, `snapshot` undoes the trial, `picture` draws the
result.

It works on any model and any torch optimizer. Nothing here knows an algorithm.
"""
