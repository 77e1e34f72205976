"""Attacks on the project's doors, each a module that is run and a function that a test calls."""
