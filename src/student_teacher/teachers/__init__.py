"""Frozen backbones and what they say of images."""
