"""The compiled inner loops of drafting: arrays in, arrays out, no Python objects.

Words: a `text` is the flat window of a request's committed tokens; positions past its end are the path under search.
"""
