"""Whether a run fits a machine that is not attached, answered by that machine's own compiler."""
