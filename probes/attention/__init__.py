"""probes.attention.ratio"""
