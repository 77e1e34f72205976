"""lensclust.storage"""
