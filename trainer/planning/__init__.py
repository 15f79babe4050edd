"""Pure arithmetic behind a plan: batches, model facts, memory, FLOPs, the DeepSpeed JSON. No torch."""
