"""Tables and figures, drawn from ledgers."""

def write_report(dirs): pass
