"""Models, by framework and then by task."""
