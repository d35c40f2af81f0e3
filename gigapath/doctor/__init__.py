"""`gigapath doctor`: what this machine and this installation are, what is wrong with them, and the mend."""

from gigapath.doctor.findings import Diagnosis
from gigapath.doctor.run import diagnose

__all__ = ["Diagnosis", "diagnose"]
