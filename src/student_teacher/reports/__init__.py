"""Figures, pages, summaries."""
