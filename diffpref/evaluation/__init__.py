"""From generated pictures and their scores to a table and a page."""
