"""Many slides: finding them, their status files, reuse of what is done, the record of a run. No torch in here."""
