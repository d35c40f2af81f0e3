"""Published names for tools that import them; the code is in `gigapath.longnet`."""
