"""lensclust.cli"""
