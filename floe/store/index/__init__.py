"""Indexes behind one interface: SQLite here."""
