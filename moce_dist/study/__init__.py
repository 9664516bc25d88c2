"""Many runs under one question: arms compared over seeds and tasks."""
