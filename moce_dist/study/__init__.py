"""Studies: arms of many runs, compared over seeds and tasks."""
