"""New dilemmas, persona pairs and evaluation items, written by a model, filtered, and kept in the shipped format.

items.py       what an item of each kind consists of; how a model writes it and how a file holds it
filters.py     why a draft is refused
writers.py     who writes: an endpoint, or a local model
production.py  slots, tries, and the files that a later run continues
"""
