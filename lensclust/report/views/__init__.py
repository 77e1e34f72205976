"""lensclust.report.views"""
