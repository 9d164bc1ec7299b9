"""LoRA fine-tuning of causal language models, one adapter or many at once."""
