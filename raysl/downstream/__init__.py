"""What follows pretraining: evaluation, fine-tuning, distillation, and all in one pipeline."""
