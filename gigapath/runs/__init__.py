"""Runs over a cohort: tile, embed, embed slides. Each keeps what is done, records what fails, and can be stopped."""
