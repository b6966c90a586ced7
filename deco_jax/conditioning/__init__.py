"""What a denoiser is conditioned on, and what to draw."""
