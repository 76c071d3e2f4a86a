"""What should it do? Gradients and training steps that the paper computes in closed form."""
