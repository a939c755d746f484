"""The ground floor: errors, slots, records, seeding, optional dependencies."""
