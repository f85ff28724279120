"""Tables: rankings, comparisons and summaries of records as numbers and as text. Nothing here draws."""
