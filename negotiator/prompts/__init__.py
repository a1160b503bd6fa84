"""Every prompt: its wording, in text files (`wording`), and its token ids (`templates`)."""
