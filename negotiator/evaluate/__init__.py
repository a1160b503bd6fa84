"""Two policies on the evaluation items: what they say, who judges it better, and how sure that is."""
