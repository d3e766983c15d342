"""What a run leaves to be read: numbers in one style, and one self-contained HTML file."""
