"""Fine-tuning Llama on SST-2 in a plain PyTorch loop."""
