"""From noise to images: guidance, samplers, generation."""
