"""The mathematics of a row of logits: its normalizer, the costs of its position, and their gradients."""
