"""Weights: loaded and sharded part by part, averaged, exported."""
