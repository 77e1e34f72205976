"""probes.heads"""
