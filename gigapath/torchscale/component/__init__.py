"""Published names of the encoder's parts."""
