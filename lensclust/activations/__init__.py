"""lensclust.activations.dataset"""
