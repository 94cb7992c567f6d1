"""Pages for people: HTML in which everything that comes from data is escaped."""
