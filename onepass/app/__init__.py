"""The program `onepass`: its commands, and what only they need.

It may import everything; the library imports nothing from here.
"""
