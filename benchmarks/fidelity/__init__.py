"""Comparison of the gradient with float64, on real weights and real fine-tuning drift."""
