"""lensclust.prompts.prompts"""
