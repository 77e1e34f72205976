"""lensclust.activations.dataset.store"""
