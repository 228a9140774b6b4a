"""What was learnable: the fixed-context diagnostic (TA-OPD, arXiv:2605.26844, section 3) and the report page."""
