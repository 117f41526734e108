"""Files: prompts, answers and scores, written so that an interrupted run loses nothing; and the chat client."""
