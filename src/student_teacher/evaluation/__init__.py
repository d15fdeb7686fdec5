"""Maps and labels in, measures out."""
