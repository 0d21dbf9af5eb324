"""Everything that proposes: drafters, the candidate lattice, the path search, the draft length, their pipeline."""
