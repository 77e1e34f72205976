"""lensclust.tasks.words"""
