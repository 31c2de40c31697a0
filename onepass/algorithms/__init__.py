"""One file an algorithm: its docstring, its signature, its rule. Nothing here knows a device, a
dtype or storage."""
