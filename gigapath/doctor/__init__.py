"""`gigapath doctor` (`diagnose`): this machine and installation. `gigapath verify`: a released pair of encoders."""
