"""From files to tensors: reading, the index, categories, caches."""
