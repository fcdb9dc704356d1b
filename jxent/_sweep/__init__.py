"""A sweep is a loop over blocks of positions, on one device. It computes costs without storing all logits."""
