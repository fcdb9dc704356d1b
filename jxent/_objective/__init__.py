"""Objectives: the costs of each position with gradients and tangents, and the rule that differentiates them all."""
