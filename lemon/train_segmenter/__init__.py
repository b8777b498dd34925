"""The stage that trains HoverFast's network on labelled images."""
