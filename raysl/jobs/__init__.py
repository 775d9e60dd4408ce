"""What one worker of a run does, from first to last, without knowing who started it."""
