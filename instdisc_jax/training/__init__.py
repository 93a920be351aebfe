"""Training: the state, the step, the schedule of events, and the loop."""
