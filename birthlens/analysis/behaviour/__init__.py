"""What does it do? Attention, head scores, and losses by role of the token."""
