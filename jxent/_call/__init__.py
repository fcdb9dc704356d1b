"""Code that all losses share: it checks arguments, finds unmasked positions, and computes the mean's denominator."""
