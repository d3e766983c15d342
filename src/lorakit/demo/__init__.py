"""The tasks that `lorakit demo` shows: questions in SQL, and the mood of film reviews."""
