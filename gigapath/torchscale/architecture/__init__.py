"""Published names of the architecture."""
