"""probes.similarity.neighbours"""
