"""What happened: rows of a ledger, and what they add up to."""
