"""Everything that checks: sampling rules, position-keyed draws, acceptance, the target model."""
