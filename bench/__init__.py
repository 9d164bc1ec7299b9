"""Speed against peers, measured in turns."""
