"""The costs of logits that are never held at once: blocks of positions, and a sweep over them on one device."""
