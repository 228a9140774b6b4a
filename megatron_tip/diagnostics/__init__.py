"""The fixed-context diagnostic (TA-OPD, arXiv:2605.26844, section 3): which tokens teach the student?"""
