"""Who makes preference batches; every source is a generator."""
