"""GPT-2: model, loader, trainer, evaluation, sampling, export."""
