"""lensclust.inference.prefix_sharing"""
