"""What people call from Python: `trimtab.train`, `check`, `sweep`, `evaluate`, `compare`, `merge`, `export`, `serve`."""
