"""One file an algorithm: its docstring, its signature, its rule."""
