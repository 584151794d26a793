"""What a run learns: the data sets. Read first: `data/base.py`, which says what all have."""
