"""After a run: what its folder holds, as one page."""
