"""π: the trainer. Batches and packing, score and update, supervised steps, and the optimizer."""
