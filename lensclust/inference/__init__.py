"""lensclust.inference"""
