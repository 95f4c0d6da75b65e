"""From logits to text: what generation and the engine share."""
