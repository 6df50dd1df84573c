"""Training: an optimizer for the backbone, solves for the head, a guard, and the loop around them."""
