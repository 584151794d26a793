"""How a run is chosen, kept and spread over GPUs. Read first: `training/options.py`."""
