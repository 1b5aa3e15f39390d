"""A short fine-tuning of SmolLM2-135M-Instruct with and without the rotation penalty: ``python -m rpsft_kernels.demo``."""
