"""Speed against baselines, measured in turns."""
