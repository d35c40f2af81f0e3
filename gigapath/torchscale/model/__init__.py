"""Published names of the models."""
