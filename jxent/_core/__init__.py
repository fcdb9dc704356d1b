"""Helpers that the other folders use: derivatives, shards, class indices, dtypes, weights and fault reports."""
