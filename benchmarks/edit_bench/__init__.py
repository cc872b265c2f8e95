"""What `edit_quality.py` and `edit_speed.py` share: items, the columns that edit, how an edit is scored, statistics."""
