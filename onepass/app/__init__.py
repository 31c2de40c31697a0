"""The program `onepass`: its commands, and what serves only them.

It may import everything; the library imports nothing from here.
"""
