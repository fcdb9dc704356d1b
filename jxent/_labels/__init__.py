"""Kinds of labels: class indices, class probabilities, and probabilities of a few classes."""
