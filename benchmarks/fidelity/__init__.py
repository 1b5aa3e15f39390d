"""The gradient against float64 on real weights and real fine-tuning drift."""
