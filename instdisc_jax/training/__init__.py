"""Training: the state, the step, what happens after which step, and the loop around it."""
