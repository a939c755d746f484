"""Problem 12: no recurrence / streaming."""
