"""Pretraining and fine-tuning: data, objectives and tasks around Hugging Face's ``Trainer``."""
