"""Verification: sampling rules, draws keyed by position, acceptance, and the target model."""
