"""lensclust.tasks.labelled"""
