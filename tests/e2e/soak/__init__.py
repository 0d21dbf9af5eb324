"""A soak test: minutes of mixed traffic with faults near the end, then a check of everything that clients saw."""
