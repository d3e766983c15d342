"""What a run will take, counted before anything is downloaded: parameters, memory, time."""
