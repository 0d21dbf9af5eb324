"""The compiled inner loops of drafting: arrays in, arrays out, no Python objects.

A `text` is a flat window of a request's committed tokens. Positions past its end belong to the path under search.
"""
