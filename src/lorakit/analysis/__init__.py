"""What adapters have learned: subspaces, spectra, amplification, and what was forgotten for it."""
