"""SD3 as released: its text encoders and its weights. Read first: `sd3/text.py`."""
