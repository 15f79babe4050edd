"""What every rank runs. Importing the package itself is free: torch arrives with the modules that need it."""
