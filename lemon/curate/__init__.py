"""Curation: slides -> nuclei -> cells."""
