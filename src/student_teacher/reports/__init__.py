"""Figures, result pages and summaries."""
