"""Files: what is asked, answered, scored, and how it is written so that nothing is lost."""
