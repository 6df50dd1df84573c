"""Training: an optimizer for the backbone, solves for the head, and what keeps them from harm."""
