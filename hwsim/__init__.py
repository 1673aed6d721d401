"""Crossbar hardware model: energy, latency and area of an exported network on a named chip."""
