"""SmolLM2-135M-Instruct fine-tuned with and without the rotation penalty: ``python -m rpsft_kernels.demo``."""
