"""The only files that know foreign key names."""
