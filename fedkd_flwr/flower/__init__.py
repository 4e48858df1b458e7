"""The seam: messages, records, contexts, grids and state on disk live here only."""
