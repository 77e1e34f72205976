"""lensclust.training.pretraining"""
