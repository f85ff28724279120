"""Standard and adversarial training of equilibrium models."""
