"""A soak: mixed traffic for minutes, faults in the end, and a comparison of all that clients saw with what was so."""
