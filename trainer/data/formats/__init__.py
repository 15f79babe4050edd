"""One module a family of file formats; `base` says what the data needs of each."""
