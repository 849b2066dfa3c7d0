"""Weights to and from other systems: diffusers folders, released single files."""
