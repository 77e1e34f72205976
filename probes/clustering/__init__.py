"""probes.clustering.clustering"""
