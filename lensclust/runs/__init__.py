"""lensclust.runs"""
