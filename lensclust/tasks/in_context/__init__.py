"""lensclust.tasks.in_context"""
