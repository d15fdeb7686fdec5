"""Frozen backbones as teachers, and their weights."""
