"""A jail for a submission's code: one process that loads the libraries once, and a walled fork of it per submission."""
