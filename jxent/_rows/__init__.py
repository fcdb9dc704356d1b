"""Formulas of one row of logits: what a class contributes, and sums and maps over the classes."""
