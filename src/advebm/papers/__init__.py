"""What the papers publish, and whether our numbers agree.  What carries tables out is in reproduction."""
