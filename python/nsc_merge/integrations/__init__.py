"""NSC merging from inside other libraries, one module each; importing one imports that library."""
