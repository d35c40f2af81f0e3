"""`gigapath doctor`: this machine and installation (`diagnose`), or a released pair of encoders (`verify`)."""
