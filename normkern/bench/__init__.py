"""bench: normkern's layers against rivals and against a plain copy. `python -m normkern bench`, `report` and the
scripts in the repository's bench/ are made of it."""
