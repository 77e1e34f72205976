"""What a page lets its reader look around in."""
