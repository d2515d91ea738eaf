"""Recipes: one plain file a training run, read like a configuration."""
