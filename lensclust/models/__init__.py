"""lensclust.models.loading"""
