"""Everything a run needs around the loop, and the loop."""
