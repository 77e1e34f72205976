"""What the scores of questions and words say: the study's claims."""
