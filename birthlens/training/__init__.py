"""Training: the loop, its schedules, and the training steps it chooses from."""
