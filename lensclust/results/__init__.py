"""lensclust.results.claims"""
