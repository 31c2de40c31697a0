"""What `onepass explain` shows: an optimizer's columns, its program, and its machine code.

The code is for this CPU (`host_assembly`) or any GPU: `target` compiles it, `gpu_assembly` and
`sass` read it. These are instruments: nothing that steps imports them.
"""
