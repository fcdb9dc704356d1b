"""What all losses share: arguments and their checks, which positions count, and what the mean divides by."""
