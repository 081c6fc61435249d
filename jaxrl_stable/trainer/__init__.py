"""The trainer, π: batches and packing, score and update, supervised steps, and the optimiser."""
