"""What `onepass explain` shows: an optimizer's columns, its program, and its machine code, for this
CPU or any GPU.

These are instruments: nothing that steps imports them.
"""
