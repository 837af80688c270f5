"""The panel loss's work on tiles, by functions that a compiler fuses.

passes.py has the functions, tiles.py compiles and calls them, first_use.py finds out whether they are right here.
"""
