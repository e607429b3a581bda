"""Tasks with right answers: their files, what a model is asked, how it answers, and the scores of its answers."""
