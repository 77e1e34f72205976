"""lensclust.tasks.synthetic"""
