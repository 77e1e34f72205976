"""probes.components.decomposition"""
