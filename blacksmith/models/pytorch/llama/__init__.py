"""Llama: models and adapters from the Hugging Face libraries, and batches that share a prefix."""
