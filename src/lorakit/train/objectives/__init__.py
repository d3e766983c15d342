"""What is learned: one object per task."""
