"""Tiny models of many families, and each feature compared with plain torch hooks on them."""
